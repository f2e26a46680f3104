"""Laws of the stage table: three counters that agree in every row, weights that move where they may, and plain errors."""

import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from bench.__main__ import StageTableFlags, measure, measurements
from bench.cli import run_bench
from bench.stages.learning import measure_learning
from bench.stages.measure import bound_by
from bench.stages.rows import Row
from engine.counting.flops import Flops, PassFlops
from engine.counting.hardware import Ceilings
from engine.counting.jaxpr import JaxprCost
from tests.tiny import QUICKLY_MEASURED

main = functools.partial(run_bench, "bench", None, StageTableFlags, measure)
SMALL = ["--preset", "tiny", "--batch", "2", "--context", "64", "--quick"]
KEYS = {
    "name",
    "weights",
    "flops_per_token",
    "flop_ratio_to_forward",
    "seconds_per_token",
    "time_ratio_to_forward",
    "peak_bytes",
    "bytes_per_token",
    "utilisation",
    "usd_per_million_tokens",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The document of one small run, and the page that it wrote."""
    folder = tmp_path_factory.mktemp("report")
    command = [
        sys.executable,
        "-c",
        QUICKLY_MEASURED,
        "bench",
        *SMALL,
        "--json",
        "--price",
        "3.6",
        "--out",
        str(folder),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1, "--json prints the document and nothing else"
    return json.loads(result.stdout), (folder / "report.html").read_text()


def rows_of(table):
    return {row["name"]: row for row in table[0]["rows"]}


@pytest.mark.whole
def test_every_row_has_what_scripts_read(table):
    for row in rows_of(table).values():
        assert row.keys() >= KEYS
        assert row["weights"] in ("changed", "partly", "identical")
        assert row["flops_per_token"].keys() >= {"formula", "walker", "walker_elementwise", "xla"}
        assert row["seconds_per_token"] > 0
        assert row["usd_per_million_tokens"] == pytest.approx(row["seconds_per_token"] * 1e6 * 3.6 / 3600)


@pytest.mark.whole
def test_three_counters_agree_in_every_row_or_it_says_why(table):
    """XLA's count is of the program as lowered for a CPU, so it is the same on one with AMX."""
    rows = rows_of(table)
    traced = [row for row in rows.values() if row["stage"] != "by hand"]
    assert len(traced) >= 16
    for row in traced:
        counted = row["flops_per_token"]
        assert counted["walker"] == counted["formula"], row["name"]
        if not row["counters_differ"]:
            assert counted["xla"] == pytest.approx(
                counted["walker"] + counted["walker_elementwise"], rel=0.01
            ), row["name"]
    assert all(
        "of sampling XLA counts" in row["counters_differ"] for row in traced if row["stage"] == "decode"
    )
    assert not any(row["counters_differ"] for row in traced if row["stage"] != "decode")
    assert all("NumPy" in row["counters_differ"] for row in rows.values() if row["stage"] == "by hand")


@pytest.mark.whole
def test_what_is_read_again_is_known_better_and_weights_move_further():
    learned = measure_learning("tiny", steps=2)
    assert learned["text"] == sorted(learned["text"], reverse=True)
    first, *fine_tuned = [kinds["all weights"] for kinds in learned["moved"].values()]
    assert first > 0
    assert fine_tuned == sorted(fine_tuned)
    assert len(fine_tuned) == len(learned["readings"]) == len(learned["other"])


@pytest.mark.whole
def test_a_training_step_is_three_forward_passes_and_freezing_the_bottom_saves_most(table):
    rows = rows_of(table)
    ratio = lambda name: rows[name]["flop_ratio_to_forward"]
    assert ratio("pre-training step") == pytest.approx(3.0, rel=0.01)
    assert ratio("full fine-tuning") == pytest.approx(3.0, rel=0.01)
    assert 1.0 == ratio("evaluation forward") < ratio("bottom half frozen") < ratio("top half frozen")
    assert ratio("top half frozen") < ratio("full fine-tuning")


@pytest.mark.whole
def test_weights_move_in_training_partly_in_fine_tuning_never_in_inference(table):
    for row in rows_of(table).values():
        trains_all = row["name"] in ("pre-training step", "full fine-tuning")
        expected = "partly" if row["stage"] == "fine-tuning" else "identical"
        expected = "changed" if trains_all or row["name"].endswith("training step") else expected
        assert row["weights"] == expected, row["name"]


@pytest.mark.whole
def test_the_claims_are_decided_and_the_report_holds_every_row(table):
    document, page = table
    result = {claim["claim"]: claim["verdict"] for claim in document["claims"] if claim["value"]}
    assert len(result) == 22
    assert result["Requests do not affect one another."] == "true"
    assert result["The model improves as you use it."] == "false"
    assert result["Inference is only half the computation of training."].startswith("false: a third")
    assert all(row["name"] in page for row in document["rows"])
    steps = [row for row in document["rows"] if row["layers"]]
    assert len(steps) == 8
    for row in steps:
        counted = row["flops_per_token"]
        passes = [sum(parts) for parts in zip(*row["layers"])]
        assert passes == pytest.approx([counted[part] for part in ("forward", "dx", "dw")])
    assert document["command"].startswith("python -m bench --preset tiny ")
    again = {claim["command"] for claim in document["claims"]}
    assert again == {"python -m bench --preset tiny --batch 2 --context 64 --price 3.6"}
    assert next(iter(document["memory"])) == "pre-training step"
    assert len(document["memory"]) == 6


def test_the_other_measurements_are_named(capsys):
    assert main(["--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])["measurements"]
    assert listed == measurements()
    assert {"step", "commands"} <= listed.keys()


def test_the_help_of_each_measurement_is_plain(capsys):
    for name in (*measurements(), "compare"):
        file = (
            f"bench.{name}"
            if Path(bench.__file__).with_name(f"{name}.py").exists()
            else f"bench.{name}.__main__"
        )
        flags = next(
            value for key, value in vars(importlib.import_module(file)).items() if key.endswith("Flags")
        )
        assert run_bench(f"bench.{name}", "", flags, lambda _: {}, ["--help"]) == 0
        shown = capsys.readouterr().out
        assert "--json" in shown
        assert not re.search(r"None|\(default: (True|False|'')\)", shown), shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "tinny"], "Did you mean 'tiny'"),
        (["--price", "-1"], "--price must be a number above 0"),
        (["--batch", "3"], "--batch must be even"),
        (["--context", "100"], "multiple of 64"),
        (["--model", "nowhere"], "There is no model at nowhere"),
        (["--preset", "llama-2-7b"], "B are available; --preset"),
        (
            ["--preset", "tiny", "--batch", "2", "--context", "64000000000"],
            "give a smaller --batch or --context",
        ),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith(".")


def test_an_out_folder_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys):
    place = tmp_path / "file"
    place.write_text("")
    assert main(["--out", str(place)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_row_is_bound_by_what_takes_half_of_its_time():
    ceilings = Ceilings(
        "", "cpu", 2, "0", bf16_gflops=1000, f32_gflops=250, int8_gflops=2000, read_gbs=10, update_gbs=20
    )
    forward = Row(
        "evaluation forward",
        "inference",
        lambda: None,
        dict,
        tokens=100,
        formula=Flops({"a": PassFlops(forward=10**9)}),
        peak_bytes=0,
        predicted_bytes=0,
        traffic=10**6,
        walker=JaxprCost(matmul=10**9),
    )
    assert bound_by(forward, 1.9e-5, ceilings) == "products"  # which take 10 us a token
    assert bound_by(forward, 2.1e-5, ceilings) == "neither"
    decode = dataclasses.replace(
        forward, stage="decode", slots=8, tokens=8, traffic=8 * 10**7
    )  # reading takes 1 ms a token
    assert bound_by(decode, 0.0019, ceilings) == "memory"
    copied = dataclasses.replace(forward, formula=Flops({}), walker=JaxprCost())
    assert copied.utilisation_of == "MBU"
