"""Models on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION: fetches one into the hub's cache, and names what lies there.

huggingface_hub caches, resumes, checks and shows progress, and reads HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME. It is
imported only when a model is fetched.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.storage.safetensors import read_index
from engine.text import OnProgress

# Fetched before the weights, those that there are: where weights are cached, these are too.
SMALL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_REASON = 200  # characters


def is_hub_id(text: object) -> bool:
    """Whether a text could be a model's id, by the rules of huggingface_hub's `validate_repo_id`."""
    return (
        isinstance(text, str)
        and bool(re.fullmatch(r"\w[\w.-]{,95}/\w[\w.-]{,95}", text, re.ASCII))
        and not re.search(r"--|\.\.|[-.](/|\Z)|\.git\Z", text)
    )


def is_hub_name(name: str) -> bool:
    """Whether a name could be ORG/NAME or ORG/NAME@REVISION, a branch, tag or commit; a .gguf file is named by its path."""
    hub_id, at, revision = name.partition("@")
    is_revision = bool(re.fullmatch(r"\w[\w./-]{,99}", revision, re.ASCII)) and ".." not in revision
    return is_hub_id(hub_id) and not name.endswith(".gguf") and (is_revision or not at)


def cached_id(folder: Path) -> str:
    """Returns ORG/NAME for a folder in the hub's cache, models--ORG--NAME/snapshots/REVISION, else an empty text."""
    snapshots = folder.resolve().parent
    kind, *parts = snapshots.parent.name.split("--")
    hub_id = "/".join(parts)
    return hub_id if (kind, snapshots.name) == ("models", "snapshots") and is_hub_id(hub_id) else ""


def fetch(name: str, cached_only: bool, check_config: Callable[[Path], object], report: OnProgress) -> Path:
    """Returns the folder of a hub's model in the hub's cache, with what it lacked fetched; nothing with `cached_only`.

    `check_config` may refuse the folder of config.json before any weight is fetched. `report`: bytes done and in all. Raises
    UserError for what cannot be had.
    """
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    constants.HF_HUB_DISABLE_TELEMETRY = True  # else it asks for a list of programs to tell the hub which one started it
    logging.set_verbosity_error()  # a line a retry would stand above the sentence that says why none helped
    hub_id, _, revision = name.partition("@")
    bar = _progress_bar(report) if report else None
    is_offline = cached_only or constants.HF_HUB_OFFLINE

    def fetch_file(file: str, revision: str | None) -> Path:
        # One at a time and in this thread, where Ctrl-C ends it at once; `snapshot_download` would wait for its threads.
        return Path(hf_hub_download(hub_id, file, revision=revision, local_files_only=is_offline, tqdm_class=bar))

    def fetch_if_there(file: str) -> Path | None:
        cached = try_to_load_from_cache(hub_id, file, revision=commit)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None  # the cache says, too, which files there are not
        try:
            return fetch_file(file, commit)
        except errors.EntryNotFoundError as error:
            if is_offline or isinstance(error, errors.RemoteEntryNotFoundError):
                return None
            raise

    try:
        config = fetch_file("config.json", revision or None)
        commit = config.parent.name
        check_config(config.parent)
        for small in SMALL:
            fetch_if_there(small)
        if index := fetch_if_there("model.safetensors.index.json"):
            for shard in sorted(set(read_index(index).values())):
                fetch_file(shard, commit)
        else:
            fetch_file("model.safetensors", commit)
        return config.parent
    except errors.RevisionNotFoundError:
        fault = f"The hub's {hub_id} has no revision {revision}: give a branch, a tag or a commit of it."
    except errors.GatedRepoError:
        fault = f"{hub_id} is given to those who accept its terms: do so at {constants.ENDPOINT}/{hub_id}, and set HF_TOKEN."
    except errors.RepositoryNotFoundError:
        fault = f"There is no {name} here, and no model {hub_id} on the hub that you may read; set HF_TOKEN for a private one."
    except errors.RemoteEntryNotFoundError as error:
        file = str(error.response.url).rpartition("/")[2]
        fault = (
            f"The hub's {name} has no {file}, and models are read from config.json and safetensors; name a .gguf by its path."
        )
    except (OSError, errors.HTTPError) as error:
        if is_offline:
            why = "HF_HUB_OFFLINE is set" if not cached_only else "only a model that --model names is fetched"
            fault = f"The hub's cache lacks {name}, or a part of it, and {why}: fetch it once by --model {name}."
        else:
            cause = " ".join(str(error.__cause__ or error).split())[:MAX_REASON].rstrip(".")
            fault = f"Could not fetch {name} from {constants.ENDPOINT}: {cause}. Files that arrived are kept."
    raise UserError(fault) from None


def _progress_bar(report: Callable[[int, int], Any]) -> Any:
    from huggingface_hub.utils import tqdm

    class ProgressBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B" and self.total and self.n:
                report(int(self.n), int(self.total))

    return ProgressBar
