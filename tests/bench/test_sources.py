"""A document's digest is of the measured sources alone; its age is counted in commits that touch them."""

import subprocess

import pytest

from bench import sources
from bench.cli import ROOT, circumstances
from bench.everything import EverythingFlags
from bench.sources import commits_since, describe_age, describe_origin, digest_sources, measured_files

MEASURED = ("engine/a.py", "engine/model/b.c", "stages/c.h", "bench/prompts.toml")
OTHERS = (
    "engine/README.md",
    "tests/a.py",
    "bench/results/x/step.json",
    "bench/pictures/a.svg",
    "bench/docs/blocks.py",
    "bench/everything.py",
)


@pytest.fixture
def checkout(tmp_path):
    for name in (*MEASURED, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    return tmp_path


def git(root, *words):
    command = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@localhost", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", [*MEASURED, *OTHERS])
def test_the_digest_changes_with_a_measured_file_and_with_no_other(checkout, name):
    before = digest_sources(checkout)
    (checkout / name).write_text("b")
    assert (digest_sources(checkout) != before) is (name in MEASURED)


@pytest.mark.parametrize("name", [*MEASURED, *OTHERS])
def test_the_commits_since_are_those_that_touch_a_measured_file(checkout, name):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "all")
    first = git(checkout, "rev-parse", "HEAD")
    assert commits_since(first, checkout) == 0
    (checkout / name).write_text("b")
    git(checkout, "commit", "-q", "-a", "-m", "a change")
    assert commits_since(first, checkout) == int(name in MEASURED)


def test_a_moved_file_is_another_digest(checkout):
    before = digest_sources(checkout)
    (checkout / "engine/a.py").rename(checkout / "stages/a.py")
    assert digest_sources(checkout) != before


def test_each_document_names_the_digest_of_this_checkout():
    about = circumstances(["bench.step"], EverythingFlags(ROOT))
    assert about["sources"] == digest_sources()
    names = {path.relative_to(ROOT).as_posix() for path in measured_files()}
    assert {"engine/by_hand/block.py", "bench/timing.py", "bench/facts.jsonl"} <= names
    assert any(name.endswith(".c") for name in names)


def test_an_age_is_said_in_words_and_no_history_is_no_error(checkout, monkeypatch):
    document = {"date": "2026-11-30T03:13:09Z", "commit": "ab12cd34" + "0" * 32}
    assert describe_origin(document) == "of 2026-11-30 (commit ab12cd34)"
    assert commits_since(document["commit"], checkout) is None, "there is no git"
    monkeypatch.setattr(sources, "commits_since", lambda commit: 14)
    assert describe_age(document) == (
        "of 2026-11-30 (commit ab12cd34), 14 commits that touch what is measured ago"
    )
    monkeypatch.setattr(sources, "commits_since", lambda commit: None)
    assert describe_age(document).endswith("an unknown number of commits ago")
    document["commit"] += "-dirty"
    assert describe_origin(document) == "of 2026-11-30 (commit ab12cd34 with changes)"
    document["commit"] = None
    assert describe_origin(document) == "of 2026-11-30 (no commit)"
