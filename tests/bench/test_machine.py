"""A document that is kept tells its machine from another of the same name: by model numbers, and by what it reached."""

import dataclasses
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import run_bench
from bench.machine import read_model_numbers, share_of_others
from engine.counting import hardware
from engine.processor import CoreTime
from tests.tiny import SMALL_MATRICES


@dataclasses.dataclass(frozen=True)
class Flags:
    pass


@pytest.mark.whole
def test_a_kept_document_says_what_the_machine_reached_before_and_after(tmp_path, monkeypatch):
    """One that is printed and not kept measures no rates, which take ten seconds."""
    monkeypatch.setattr(hardware, "MEASURE_PROGRAM", SMALL_MATRICES + hardware.MEASURE_PROGRAM)
    measure = lambda _: time.sleep(0.1) or {"rows": []}
    assert run_bench("bench.nothing", "", Flags, measure, ["--out", str(tmp_path)]) == 0
    machine = json.loads((tmp_path / "nothing.json").read_text())["machine"]
    for moment in ("before", "after"):
        rates = machine[f"reached_{moment}"]
        assert set(rates) == set(hardware.RATES)
        assert min(rates.values()) > 0
    assert 0 <= machine["taken_by_others"] <= 1
    assert machine["model_numbers"] == read_model_numbers()


def test_what_is_only_printed_measures_no_rates(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "MEASURE_PROGRAM", "raise AssertionError")
    assert run_bench("bench.nothing", "", Flags, lambda _: {"rows": []}, ["--json"]) == 0
    assert "reached_before" not in json.loads(capsys.readouterr().out)["machine"]


def test_the_model_numbers_are_the_first_processors(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: "
        "a chip\nstepping\t: 1\n"
        "microcode\t: 0x1000065\n\nprocessor\t: 1\nvendor_id\t: other\ncpu family\t: 6\n"
    )
    assert read_model_numbers(cpuinfo) == {
        "vendor_id": "AuthenticAMD",
        "cpu family": "26",
        "model": "2",
        "stepping": "1",
        "microcode": "0x1000065",
    }
    assert read_model_numbers(tmp_path / "none") == {}


@given(total=st.floats(1, 1e6), share=st.floats(0, 1), first=st.floats(0, 1e6))
def test_the_share_of_others_is_of_the_time_between_two_readings(total, share, first):
    start = CoreTime(first, first / 2)
    end = CoreTime(first + total, first / 2 + share * total)
    assert share_of_others(start, end) == pytest.approx(share, abs=1e-6)


def test_no_share_is_told_where_no_time_is_counted():
    assert share_of_others(None, CoreTime(2.0, 1.0)) is None
    assert share_of_others(CoreTime(2.0, 1.0), CoreTime(2.0, 1.0)) is None
