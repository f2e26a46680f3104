"""Tells the measured sources of this checkout from others: their digest, and the commits since a document."""

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.machine import Json
from engine.format import quantity

ROOT = Path(__file__).parent.parent
ROOMS = ("engine", "stages", "bench")
# Code, and the prompts and facts that models are asked.
SUFFIXES = (".py", ".c", ".h", ".toml", ".jsonl")
# These write READMEs or start measurements: an edit changes no figure.
UNMEASURED = ("bench/docs", "bench/results", "bench/pictures", "bench/everything.py")


def digest_sources(root: Path = ROOT) -> str:
    """Returns the SHA-256 of the paths and contents of all measured files."""
    digest = hashlib.sha256()
    for path in measured_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def measured_files(root: Path = ROOT) -> Iterator[Path]:
    """Yields the files in ROOMS that a measurement depends on, in order."""
    unmeasured = [root / name for name in UNMEASURED]
    for room in ROOMS:
        for path in sorted((root / room).rglob("*")):
            is_unmeasured = any(path.is_relative_to(other) for other in unmeasured)
            if path.suffix in SUFFIXES and path.is_file() and not is_unmeasured:
                yield path


def commits_since(commit: str, root: Path = ROOT) -> int | None:
    """Returns the number of later commits that touch measured files; None where git or the history
    does not tell.
    """
    excluded = [f":(exclude){name}" for name in UNMEASURED]
    included = [f":(glob){room}/**/*{suffix}" for room in ROOMS for suffix in SUFFIXES]
    words = ["git", "-C", str(root), "rev-list", "--count", f"{commit}..HEAD", "--", *included, *excluded]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return None


def describe_origin(document: Json) -> str:
    """Returns the date and the commit of a document: `of 2026-11-30 (commit ab12cd34)`."""
    day = document["date"][:10]
    commit = document["commit"]
    if not commit:
        return f"of {day} (no commit)"
    words = f"commit {commit[:8]}"
    if commit.endswith("-dirty"):
        words += " with changes"
    return f"of {day} ({words})"


def describe_age(document: Json) -> str:
    """Returns the origin of a document, and how many commits that touch measured files came later."""
    origin = describe_origin(document)
    count = None
    if document["commit"]:
        count = commits_since(document["commit"].removesuffix("-dirty"))
    if count is None:
        return f"{origin}, an unknown number of commits ago"
    return f"{origin}, {quantity(count, 'commit')} that touch what is measured ago"
