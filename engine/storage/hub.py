"""Models on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION: fetches one, and names what is cached.

huggingface_hub caches, resumes, checks and shows progress, and reads HF_TOKEN, HF_HUB_OFFLINE,
HF_ENDPOINT and HF_HOME. It is imported only when a model is fetched.
"""

import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.storage.safetensors import read_index
from engine.text import OnProgress

# Fetched before the weights, those that there are: where weights are cached, these are too.
SMALL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_REASON = 200  # characters
MAX_LISTED = 6  # files that a sentence names
MAX_NAME = 96  # characters of one of them
LISTING_SECONDS = 10.0


def is_hub_id(text: object) -> bool:
    """Whether a text could be a model's id, by the rules of huggingface_hub's `validate_repo_id`."""
    return (
        isinstance(text, str)
        and bool(re.fullmatch(r"\w[\w.-]{,95}/\w[\w.-]{,95}", text, re.ASCII))
        and not re.search(r"--|\.\.|[-.](/|\Z)|\.git\Z", text)
    )


def is_hub_name(name: str) -> bool:
    """Whether a name could be ORG/NAME or ORG/NAME@REVISION, a branch, tag or commit; a .gguf file
    is named by its path.
    """
    hub_id, at, revision = name.partition("@")
    is_revision = bool(re.fullmatch(r"\w[\w./-]{,99}", revision, re.ASCII)) and ".." not in revision
    return is_hub_id(hub_id) and not name.endswith(".gguf") and (is_revision or not at)


def split_gguf_name(name: str) -> tuple[str, str] | None:
    """Splits the name of a file on the hub, as llama.cpp and Ollama write it; returns None for any
    other name.

    ORG/NAME/FILE.gguf gives (ORG/NAME, FILE.gguf), and ORG/NAME:QUANTISATION gives (ORG/NAME,
    QUANTISATION).
    """
    match = re.fullmatch(r"([^/:]+/[^/:]+)(?::([\w.-]+)|/(.+\.gguf))", name, re.ASCII)
    if match is None or not is_hub_id(match[1]):
        return None
    return match[1], match[2] or match[3]


def explain_gguf_name(name: str, hub_id: str, wanted: str) -> str:
    """Returns why `name`, of `split_gguf_name`, is not loaded: says what the repository holds and
    how to fetch the file.
    """
    from huggingface_hub import errors

    takes = f"{name} names a file on the hub, and a .gguf is read where it lies here"
    try:
        files = _list_gguf_files(hub_id)
    except errors.RepositoryNotFoundError:
        return _explain_missing(name, hub_id)
    if files is None:
        pattern = wanted if wanted.endswith(".gguf") else f"*{wanted}*.gguf"
        command = f"hf download {hub_id} --include {shlex.quote(pattern)} --local-dir ."
        return f"{takes}: fetch it by `uv run {command}`. The hub did not say what {hub_id} holds."
    if not files:
        reads = f"{hub_id} alone stands for its config.json and safetensors, if it has them."
        return f"The hub's {hub_id} holds no .gguf file; {reads}"
    # A quantisation is a whole word of a file's name: Q4_K is not found in Q4_K_M.
    is_wanted = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", re.IGNORECASE)
    matches = [file for file in files if file == wanted or is_wanted.search(file.removesuffix(".gguf"))]
    if not matches:
        return f"The hub's {hub_id} has no {wanted}. {_how_to_fetch(hub_id, files)}"
    others = [file for file in files if file != matches[0]]
    if others:
        holds = f" The repository also holds {_list_names(others)}."
    else:
        holds = ""
    return f"{takes}. {_how_to_fetch(hub_id, matches[:1])}{holds}"


def _explain_missing(name: str, hub_id: str) -> str:
    missing = f"There is no {name} here, and no model {hub_id} on the hub that you may read"
    return f"{missing}; set HF_TOKEN for a private one."


def _list_gguf_files(hub_id: str) -> list[str] | None:
    """Returns the .gguf files of a repository, the shortest names first; None where the hub cannot
    be asked or does not say.

    Raises RepositoryNotFoundError.
    """
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        siblings = HfApi().model_info(hub_id, timeout=LISTING_SECONDS).siblings or []
    except errors.RepositoryNotFoundError:
        raise
    except (OSError, errors.HTTPError, ValueError, TypeError, KeyError):
        # the last three for a reply that is no list of files
        return None
    names = [sibling.rfilename for sibling in siblings]
    files = [
        name for name in names if name.endswith(".gguf") and name.isprintable() and len(name) <= MAX_NAME
    ]
    return sorted(files, key=lambda name: (len(name), name))


def _how_to_fetch(hub_id: str, files: list[str]) -> str:
    """Names the files of a repository and the command that fetches the first."""
    file = shlex.quote(files[0])
    if len(files) > 1:
        holds = f"It holds {_list_names(files)}: fetch one"
    else:
        holds = "Fetch it"
    return f"{holds} by `uv run hf download {hub_id} {file} --local-dir .`, and name {file}."


def _list_names(names: list[str]) -> str:
    if len(names) > MAX_LISTED:
        more = f" and {len(names) - MAX_LISTED} more"
    else:
        more = ""
    return ", ".join(names[:MAX_LISTED]) + more


def cached_id(folder: Path) -> str:
    """Returns ORG/NAME for a folder in the hub's cache, models--ORG--NAME/snapshots/REVISION, else
    an empty text.
    """
    snapshots = folder.resolve().parent
    kind, *parts = snapshots.parent.name.split("--")
    hub_id = "/".join(parts)
    if (kind, snapshots.name) == ("models", "snapshots") and is_hub_id(hub_id):
        return hub_id
    return ""


def fetch(name: str, cached_only: bool, check_config: Callable[[Path], object], report: OnProgress) -> Path:
    """Returns the folder of a hub's model in the hub's cache, with what it lacked fetched; nothing
    with `cached_only`.

    `check_config` may refuse the folder of config.json before any weight is fetched. `report`:
    bytes done and in all. Raises UserError for what cannot be had.
    """
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    # else it asks for a list of programs to tell the hub which one started it
    constants.HF_HUB_DISABLE_TELEMETRY = True
    # a line a retry would stand above the sentence that says why none helped
    logging.set_verbosity_error()
    hub_id, _, revision = name.partition("@")
    bar = _progress_bar(report) if report else None
    is_offline = cached_only or constants.HF_HUB_OFFLINE

    def fetch_file(file: str, revision: str | None) -> Path:
        # One at a time and in this thread, where Ctrl-C ends it at once; `snapshot_download` would
        # wait for its threads.
        return Path(
            hf_hub_download(hub_id, file, revision=revision, local_files_only=is_offline, tqdm_class=bar)
        )

    def fetch_if_there(file: str) -> Path | None:
        cached = try_to_load_from_cache(hub_id, file, revision=commit)
        if cached is not None:
            # the cache says, too, which files there are not
            if isinstance(cached, str):
                return Path(cached)
            return None
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
        index = fetch_if_there("model.safetensors.index.json")
        if index:
            for shard in sorted(set(read_index(index).values())):
                fetch_file(shard, commit)
        else:
            fetch_file("model.safetensors", commit)
        return config.parent
    except errors.RevisionNotFoundError:
        fault = f"The hub's {hub_id} has no revision {revision}: give a branch, a tag or a commit of it."
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{hub_id}"
        fault = f"{hub_id} is given to those who accept its terms: do so at {page}, and set HF_TOKEN."
    except errors.RepositoryNotFoundError:
        fault = _explain_missing(name, hub_id)
    except errors.RemoteEntryNotFoundError as error:
        file = str(error.response.url).rpartition("/")[2]
        fault = f"The hub's {name} has no {file}, and models are read from config.json and safetensors."
        files = _list_gguf_files(hub_id)
        if files:
            fault += f" {_how_to_fetch(hub_id, files)}"
    except (OSError, errors.HTTPError) as error:
        if is_offline:
            if not cached_only:
                why = "HF_HUB_OFFLINE is set"
            else:
                why = "only a model that its user names is fetched"
            fault = (
                f"The hub's cache lacks {name}, or a part of it, and {why}: fetch it once by naming {name}."
            )
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
