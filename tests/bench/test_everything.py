"""All documents of a machine are of one commit: what is there is kept, what is not is measured; processes are pooled."""

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import everything
from bench.cli import ROOT, run_bench
from bench.everything import MEASUREMENTS, EverythingFlags, Measurement, pool, with_repeating
from bench.timing import median_ratio
from engine.errors import UserError

ROUNDS = st.lists(st.floats(0.5, 2), min_size=1, max_size=4)


@given(st.lists(ROUNDS, min_size=1, max_size=5), st.floats(0.1, 3))
def test_a_pooled_ratio_is_of_the_rounds_of_all_processes(processes, bar):
    documents = [
        {
            "rows": [
                {"name": "a", "speed": float(number), "bar": bar, "met": None}
                | median_ratio(rounds)._asdict()
            ]
        }
        for number, rounds in enumerate(processes)
    ]
    (row,) = pool(documents)["rows"]
    together = median_ratio([ratio for rounds in processes for ratio in rounds])
    assert {name: row[name] for name in together._fields} == together._asdict()
    assert row["met"] == together.exceeds(bar)
    assert row["speed"] == (len(processes) - 1) / 2, "the median"
    assert row["name"] == "a"


def test_what_is_no_number_is_the_first_processes():
    documents = [
        {"commit": "a", "flags": {"rounds": 1, "quick": False}, "printed": ["x"]},
        {"commit": "b", "flags": {}, "printed": []},
    ]
    assert pool(documents) == documents[0]
    assert pool([{"a": None, "b": None}, {"a": {"c": 1.5}, "b": None}]) == {"a": {"c": 1.5}, "b": None}


def test_a_pooled_row_says_each_setting_that_its_processes_chose():
    flash = {"flash_attention": True, "threads": 2}
    plain = {"flash_attention": False, "threads": 2}
    documents = [{"rows": [{"peer_settings": [setting]}]} for setting in (flash, plain, flash)]
    assert pool(documents) == {"rows": [{"peer_settings": [flash, plain]}]}


def test_a_document_that_repeats_a_claim_is_measured_after_it():
    def names(*files: str) -> list[str]:
        return [measurement.name for measurement in with_repeating(MEASUREMENTS, files)]

    assert names("documents.json") == ["documents", "bench"]
    assert names("step.json", "bench.json") == ["bench", "step"]


def test_a_recording_is_not_kept(monkeypatch, tmp_path):
    class Watch:
        def finish(self):
            return {"taken_by_others": 0.0}

    monkeypatch.setattr(everything, "Watch", Watch)
    monkeypatch.setattr(everything, "_run", lambda *_: {"machine": {}, "lives": [0] * 1000, "cost": [1]})
    path = tmp_path / "lives.json"
    everything.measure_document(Measurement("lives", ("bench.lives",), drop=("lives",)), path, None)
    assert json.loads(path.read_text()) == {
        "machine": {"taken_by_others": 0.0},
        "cost": [1],
        "processes": 1,
    }


@pytest.fixture
def measured(monkeypatch):
    """The names of what was measured; `broken` fails. Nothing of it runs."""
    names = []

    def measure(measurement, path, _):
        names.append(measurement.name)
        if measurement.name == "broken":
            raise UserError("it is broken.")
        path.write_text(json.dumps(about))

    about = {"commit": "c" * 40, "versions": {"jax": "1"}, "machine": {}, "date": "today"}
    monkeypatch.setattr(everything, "circumstances", lambda *_: about)
    monkeypatch.setattr(everything, "measure_document", measure)
    monkeypatch.setattr(
        everything, "MEASUREMENTS", [Measurement(name, (name,)) for name in ("one", "broken", "two")]
    )
    monkeypatch.setattr(everything, "LAST", ())
    return names


def test_the_same_command_goes_on_where_it_ended(measured, tmp_path):
    flags = EverythingFlags(tmp_path)
    with pytest.raises(UserError, match="broken failed"):
        everything.measure_everything(flags)
    assert measured == ["one", "broken", "two"]
    older = json.loads((tmp_path / "two.json").read_text()) | {"commit": "d" * 40}
    (tmp_path / "two.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="broken failed"):
        everything.measure_everything(flags)
    assert measured[3:] == ["broken", "two"]


def test_a_document_that_was_disturbed_is_measured_again(measured, monkeypatch, tmp_path):
    kept = everything.measure_document
    shares = iter([0.0, 0.3, 0.2])  # that others took of each measurement

    def measure(measurement, path, peer_python):
        kept(measurement, path, peer_python)
        document = json.loads(path.read_text())
        document["machine"]["taken_by_others"] = next(shares, 0.0)
        path.write_text(json.dumps(document))

    monkeypatch.setattr(everything, "measure_document", measure)
    everything.measure_everything(EverythingFlags(tmp_path, only=("one", "two")))
    assert measured == ["one", "two", "two", "two"]


def test_a_machine_that_others_always_disturb_ends_a_sitting(measured, monkeypatch, tmp_path):
    kept = everything.measure_document

    def measure(measurement, path, peer_python):
        kept(measurement, path, peer_python)
        document = json.loads(path.read_text()) | {"machine": {"taken_by_others": 0.5}}
        path.write_text(json.dumps(document))

    monkeypatch.setattr(everything, "measure_document", measure)
    everything.measure_everything(EverythingFlags(tmp_path, only=("two",)))
    assert measured == ["two"] * (1 + everything.AGAIN)


def test_one_document_is_measured_alone_and_an_unknown_one_is_named(measured, tmp_path):
    everything.measure_everything(EverythingFlags(tmp_path, only=("two",)))
    assert measured == ["two"]
    with pytest.raises(UserError, match="three is no document's name: one, broken, two"):
        everything.measure_everything(EverythingFlags(tmp_path, only=("three",)))


def test_sources_of_no_commit_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(everything, "circumstances", lambda *_: {"commit": "c0ffee-dirty"})
    main = lambda: run_bench(
        "bench.everything", "", EverythingFlags, everything.measure_everything, ["--folder", str(tmp_path)]
    )
    assert main() == 2
    assert "commit or stash what has changed" in capsys.readouterr().err


@pytest.mark.night
@pytest.mark.timeout(900)
def test_a_sitting_through_the_real_command(tmp_path):
    """On a copy of this checkout, committed: a document of nine processes without torch, which the
    second run keeps.
    """
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("engine", "stages", "bench"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *words], cwd=checkout, check=True)
    words = ["-m", "bench.everything", "--folder", "bench/results/here", "--only", "peers", "--json"]
    runs = []
    for _ in range(2):
        runs.append(
            subprocess.run(
                [sys.executable, *words], cwd=checkout, capture_output=True, text=True, check=False
            )
        )
        assert runs[-1].returncode == 0, runs[-1].stderr
    document = json.loads((checkout / "bench/results/here/peers.json").read_text())
    assert document["machine"]["reached_before"]["f32_gflops"] > 0
    assert len(document["commit"]) == 40
    assert "measuring: python -m bench.peers --rounds 1" in runs[0].stderr
    assert "kept: bench/results/here/peers.json" in runs[1].stderr
