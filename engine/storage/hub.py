"""Models on the Hugging Face hub: fetches one, and names what is cached.

ORG/NAME or ORG/NAME@REVISION is a repository, of which config.json and safetensors are read, or, where
it has none, its .gguf file in Q4_K_M. ORG/NAME:QUANTISATION and ORG/NAME/FILE.gguf name such a file,
as for llama.cpp and Ollama.

huggingface_hub caches, resumes, checks and shows progress, and reads HF_TOKEN, HF_HUB_OFFLINE,
HF_ENDPOINT and HF_HOME. It is imported only when a model is fetched.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from engine.errors import UserError
from engine.storage.gguf_parts import is_later_part, part_names
from engine.storage.safetensors import read_index
from engine.text import OnProgress

# Fetched before the weights, those that there are: where weights are cached, these are too.
SMALL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"  # of weights in several files
ONE_FILE = "model.safetensors"
MAX_REASON = 200  # characters
MAX_LISTED = 6  # files that a sentence names
MAX_NAME = 255  # characters of one of them
LISTING_SECONDS = 10.0
DEFAULT_QUANTISATION = "Q4_K_M"


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


def _explain_missing(name: str, hub_id: str) -> str:
    missing = f"There is no {name} here, and no model {hub_id} on the hub that you may read"
    return f"{missing}; set HF_TOKEN for a private one."


def _explain_not_cached(name: str, cached_only: bool) -> str:
    why = "HF_HUB_OFFLINE is set"
    if cached_only:
        why = "only a model that its user names is fetched"
    return f"The hub's cache lacks {name}, or a part of it, and {why}: fetch it once by naming {name}."


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
    return _sort_gguf_files([sibling.rfilename for sibling in siblings])


def _list_cached_gguf_files(hub_id: str) -> list[str]:
    """Returns the .gguf files of a repository's newest revision in the cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, errors.HTTPError, ValueError):
        return []
    return _sort_gguf_files([file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf")])


def _sort_gguf_files(names: list[str]) -> list[str]:
    """Returns the .gguf files among names that can be shown, the shortest first; of a model in parts
    the first.
    """
    files = []
    for name in names:
        can_be_shown = name.isprintable() and len(name) <= MAX_NAME
        if name.endswith(".gguf") and can_be_shown and not is_later_part(name):
            files.append(name)
    return sorted(sorted(files), key=len)


def _find_quantisation(files: list[str], wanted: str) -> str | None:
    """Returns the first file whose name has a quantisation as a whole word: Q4_K is not found in Q4_K_M."""
    as_word = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", re.IGNORECASE)
    for file in files:
        if as_word.search(file.removesuffix(".gguf")):
            return file
    return None


def _list_names(names: list[str]) -> str:
    more = ""
    if len(names) > MAX_LISTED:
        more = f" and {len(names) - MAX_LISTED} more"
    return ", ".join(names[:MAX_LISTED]) + more


def gguf_name(file: Path) -> str:
    """Returns ORG/NAME/FILE.gguf for a file in the hub's cache, else an empty text."""
    for folder in file.parents:
        hub_id = cached_id(folder)
        if hub_id:
            return f"{hub_id}/{file.relative_to(folder).as_posix()}"
    return ""


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
    """Returns the folder of a hub's model in the hub's cache, or its .gguf file where the repository
    has no safetensors, with what it lacked fetched; nothing with `cached_only`.

    `check_config` may refuse the folder of config.json before any weight is fetched. `report`:
    bytes done and in all. Raises UserError for what cannot be had.
    """
    from huggingface_hub import errors, try_to_load_from_cache

    hub_id, _, revision = name.partition("@")
    with _connection(name, cached_only, report) as fetch_file:

        def fetch_if_there(file: str, commit: str) -> Path | None:
            cached = try_to_load_from_cache(hub_id, file, revision=commit)
            if isinstance(cached, str):
                return Path(cached)
            if cached is not None:  # the cache knows that the repository has no such file
                return None
            try:
                return fetch_file(file, commit)
            except errors.EntryNotFoundError as error:
                if _is_offline(cached_only) or isinstance(error, errors.RemoteEntryNotFoundError):
                    return None
                raise

        if not revision and not _has_safetensors(hub_id, cached_only):
            gguf_file = _find_quantisation(_gguf_files(hub_id, cached_only) or [], DEFAULT_QUANTISATION)
            if gguf_file:
                return _fetch_parts(gguf_file, fetch_file)
        config = fetch_file("config.json", revision or None)
        commit = config.parent.name
        check_config(config.parent)
        for small in SMALL:
            fetch_if_there(small, commit)
        index = fetch_if_there(INDEX, commit)
        if index:
            for shard in sorted(set(read_index(index).values())):
                fetch_file(shard, commit)
        else:
            fetch_file(ONE_FILE, commit)
        return config.parent


def _has_safetensors(hub_id: str, cached_only: bool) -> bool:
    """Whether a repository has config.json and safetensors, by the cache, or else by the hub if it may
    be asked.

    Raises what the hub raises where it cannot be asked, for then it may have them.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    def is_cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(hub_id, file), str)

    if is_cached("config.json") and (is_cached(INDEX) or is_cached(ONE_FILE)):
        return True
    if _is_offline(cached_only):
        return False
    is_there = functools.partial(HfApi().file_exists, hub_id)
    return is_there("config.json") and (is_there(INDEX) or is_there(ONE_FILE))


def _fetch_parts(file: str, fetch_file: Callable[[str, str | None], Path]) -> Path:
    """Returns a .gguf file in the cache, or the first part of a model in several, with all fetched.

    The others are fetched at the first one's commit: a branch may move meanwhile.
    """
    first, *others = part_names(file)
    path = fetch_file(first, None)
    commit = path.parents[first.count("/")].name
    for other in others:
        fetch_file(other, commit)
    return path


def fetch_gguf(name: str, hub_id: str, wanted: str, cached_only: bool, report: OnProgress) -> Path:
    """Returns a .gguf file in the hub's cache, fetched if it lacked; nothing is with `cached_only`.

    `hub_id` and `wanted`, a file or a quantisation: of `split_gguf_name`. Raises UserError for what
    cannot be had, and names what the repository holds.
    """
    with _connection(name, cached_only, report) as fetch_file:
        file = wanted
        if not wanted.endswith(".gguf"):
            file = _choose_gguf_file(name, hub_id, wanted, cached_only)
        return _fetch_parts(file, fetch_file)


def _choose_gguf_file(name: str, hub_id: str, quantisation: str, cached_only: bool) -> str:
    """Returns the .gguf file of a repository that is in a quantisation. Raises UserError without one, for `name`."""
    files = _gguf_files(hub_id, cached_only)
    file = _find_quantisation(files or [], quantisation)
    if file:
        return file
    if _is_offline(cached_only):
        raise UserError(_explain_not_cached(name, cached_only))
    if files is None:
        raise UserError(f"The hub did not say what {hub_id} holds: name a file, {hub_id}/FILE.gguf.")
    raise UserError(f"The hub's {hub_id} has no {quantisation}.{_say_what_it_holds(hub_id, files)}")


def _gguf_files(hub_id: str, cached_only: bool) -> list[str] | None:
    """Returns the .gguf files of a repository: those in the cache where the hub is not to be asked or
    does not say, None where there are none of these either.
    """
    if not cached_only:
        files = _list_gguf_files(hub_id)
        if files is not None:
            return files
    return _list_cached_gguf_files(hub_id) or None


def _say_what_it_holds(hub_id: str, files: list[str] | None) -> str:
    """Returns a sentence, after a space, on a repository's .gguf files; none where these are unknown."""
    if files is None:
        return ""
    if not files:
        return f" It holds no .gguf file; {hub_id} alone stands for its config.json and safetensors."
    return f" It holds {_list_names(files)}: name one, {hub_id}/FILE.gguf."


def _is_offline(cached_only: bool) -> bool:
    from huggingface_hub import constants

    return bool(cached_only or constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _connection(
    name: str, cached_only: bool, report: OnProgress
) -> Iterator[Callable[[str, str | None], Path]]:
    """Gives a function that returns a file of a revision, fetched into the cache. Makes one UserError
    of whatever the hub refuses to `name`.
    """
    from huggingface_hub import constants, errors, hf_hub_download
    from huggingface_hub.utils import logging

    # else it asks for a list of programs to tell the hub which one started it
    constants.HF_HUB_DISABLE_TELEMETRY = True
    # a line a retry would stand above the sentence that says why none helped
    logging.set_verbosity_error()
    gguf = split_gguf_name(name)
    hub_id, _, revision = name.partition("@")
    if gguf:
        hub_id, _ = gguf
    bar = None
    if report:
        bar = _progress_bar(report)
    is_offline = _is_offline(cached_only)

    def fetch_file(file: str, revision: str | None) -> Path:
        # One at a time and in this thread, where Ctrl-C ends it at once; `snapshot_download` would
        # wait for its threads.
        return Path(
            hf_hub_download(hub_id, file, revision=revision, local_files_only=is_offline, tqdm_class=bar)
        )

    try:
        yield fetch_file
        return
    except errors.RevisionNotFoundError:
        fault = f"The hub's {hub_id} has no revision {revision}: give a branch, a tag or a commit of it."
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{hub_id}"
        fault = f"{hub_id} is given to those who accept its terms: do so at {page}, and set HF_TOKEN."
    except errors.RepositoryNotFoundError:
        fault = _explain_missing(name, hub_id)
    except errors.RemoteEntryNotFoundError as error:
        files = _list_gguf_files(hub_id)
        # ENDPOINT/ORG/NAME/resolve/REVISION/FILE
        file = unquote(str(error.response.url)).partition("/resolve/")[2].partition("/")[2]
        if gguf:
            fault = f"The hub's {hub_id} has no {file}.{_say_what_it_holds(hub_id, files)}"
        else:
            fault = f"The hub's {name} has no {file}, and models are read from config.json and safetensors."
            if files:
                fault += _say_what_it_holds(hub_id, files)
    except (OSError, errors.HTTPError) as error:
        if is_offline:
            fault = _explain_not_cached(name, cached_only)
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
