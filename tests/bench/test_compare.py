"""Two results are compared by the ratios that both measured; those of different machines only when that is asked for."""

import functools
import json

import pytest

from bench.cli import run_bench
from bench.compare import CompareFlags, compare

main = functools.partial(run_bench, "bench compare", None, CompareFlags, compare)


def rounds(ratio):
    """The ratios of nine rounds that lie about one."""
    return [ratio * (1 + 0.01 * offset) for offset in range(-4, 5)]


def result(path, *, share=0.5, muon=1.2, processor="a chip", peers=()):
    """Writes a made result with a row of the stage table and a nested ratio."""
    rows = [
        {
            "name": "decode alone",
            "seconds_per_token": 1.0,
            "time_ratio_to_forward": share,
            "round_ratios": rounds(share),
        },
        {"name": "evaluation forward", "time_ratio_to_forward": 1.0, "round_ratios": []},
    ]
    shapes = [{"shape": "4x256x256x16", "muon_over_adamw": {"ratio": muon, "round_ratios": rounds(muon)}}]
    over = {"ratio": 1.0, "round_ratios": rounds(1.0)}
    shapes += [{"name": "train", "peer": peer} | over for peer in peers]
    models = [{"model": peer, "rows": [{"name": "full", "over_full": over}]} for peer in peers]
    machine = {"processor": processor, "instructions": "avx2", "cores": 2}
    path.write_text(
        json.dumps(
            {"machine": machine, "date": "2026-11-29", "rows": rows, "shapes": shapes, "models": models}
        )
    )
    return str(path)


def test_a_ratio_has_moved_where_the_rounds_of_both_results_say_so(tmp_path, capsys):
    """The exit code says so too."""
    before, after = result(tmp_path / "a.json"), result(tmp_path / "b.json", share=0.501, muon=1.1)
    assert main([before, after, "--json", "--out", str(tmp_path / "kept")]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows.keys() == {"decode alone", "shapes, 4x256x256x16, muon_over_adamw"}
    assert rows["decode alone"]["verdict"] == "undecided"
    muon = rows["shapes, 4x256x256x16, muon_over_adamw"]
    assert muon["verdict"] == "smaller"
    assert muon["ratio"] == pytest.approx(1.1 / 1.2)
    assert muon["low"] < muon["ratio"] < muon["high"] < 1
    assert json.loads((tmp_path / "kept" / "compare.json").read_text())["rows"] == [*rows.values()]
    assert main([after, before]) == 1
    assert "larger" in capsys.readouterr().out
    assert main([before, before]) == 0


def test_rows_of_one_name_are_told_apart_by_what_else_they_are_of(tmp_path, capsys):
    before, after = (
        result(tmp_path / "a.json", peers=("eager", "compiled")),
        result(tmp_path / "b.json", peers=("compiled",)),
    )
    for other, peers in ((before, ["eager", "compiled"]), (after, ["compiled"])):
        assert main([before, other, "--json"]) == 0
        names = [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]][2:]
        assert names == [f"shapes, train, {peer}" for peer in peers] + [
            f"models, {peer}, full, over_full" for peer in peers
        ]


def test_results_that_cannot_be_compared_are_refused(tmp_path, capsys):
    here, there = result(tmp_path / "a.json"), result(tmp_path / "b.json", processor="another")
    assert main([here, there]) == 2
    assert "processor a chip and another. Give --any-machine." in capsys.readouterr().err
    assert main([here, there, "--any-machine"]) == 0
    other = json.loads((tmp_path / "a.json").read_text()) | {"flags": {"quick": True, "out": "x"}}
    (tmp_path / "quick.json").write_text(json.dumps(other))
    assert main([here, str(tmp_path / "quick.json")]) == 2
    assert "measured with another quick. Give --any-flags." in capsys.readouterr().err
    for content in (
        "{",
        "[]",
        "{}",
        '{"machine": {"processor": "a chip", "instructions": "avx2", "cores": 2}, "date": "x"}',
        None,
    ):
        (tmp_path / "c.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "c.json").write_text(content)
        assert main([here, str(tmp_path / "c.json")]) == 2, content
        assert "Traceback" not in capsys.readouterr().err
