"""Any model is measured on this machine by one command, and one that has no room for the loads is named."""

import json

import pytest

from bench.cli import run_bench
from bench.model import LOADS, TUNING_ROWS, ModelFlags, measure_model
from tests.text.chat_models import save_chat_model


def run(folder, *words):
    words = ["--model", str(folder), "--rounds", "1", "--json", *words]
    return run_bench("bench.model", "", ModelFlags, measure_model, words)


@pytest.mark.whole
def test_a_model_is_measured_and_what_tuning_it_would_take_is_asked(tmp_path, capsys):
    save_chat_model(folder := tmp_path / "sea", context=1536)
    assert run(folder) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [row["name"] for row in document["rows"]] == [load.name for load in LOADS]
    for row, load in zip(document["rows"], LOADS):
        tokens = round(row["tokens_a_second"] * row["seconds"])
        assert tokens >= (load.prompt if load.reads else load.streams)
    assert document["tuning"].keys() == {*TUNING_ROWS}
    assert "writing, eight streams" in printed.err


@pytest.mark.parametrize("context", [150, 520])
def test_a_model_without_room_for_the_loads_is_named(tmp_path, capsys, context):
    save_chat_model(folder := tmp_path / "small", context=context)
    assert run(folder, "--no-tuning") == 2
    assert (
        f"small has a context of {context} tokens: reading a prompt of 512 does not fit"
        in capsys.readouterr().err
    )
