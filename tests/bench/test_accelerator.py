"""The accelerator's bench: that it refuses a machine without one, and that its checks and page see what is wrong."""

import json
import os

import jax
import pytest
from tiny import lively_params, tiny_config

from bench.accelerator import __main__ as command
from bench.accelerator import checks, report, run
from bench.accelerator.__main__ import main
from bench.accelerator.report import write_page
from bench.accelerator.table import fit
from bench.peers.process import PeerError
from bench.timing import MIN_ROUNDS, measure
from engine.counting.hardware import Ceilings
from engine.device import Device
from engine.errors import UserError
from engine.inference.slots import Slots
from engine.model.config import preset


@pytest.fixture
def rehearse(monkeypatch, tmp_path, capsys):
    """Returns a call of the command whose sections take no time: its exit code, how often it saved, and the document."""
    saved = []
    monkeypatch.setattr(run, "measure_ceilings", lambda: Ceilings("", "cpu", 1, "", 1, 1, 1, 1, 1))
    monkeypatch.setattr(run, "all_checks", lambda: [checks.Check("loss", 0.0, 1.0)])
    monkeypatch.setattr(run, "add_peer", lambda *_: None)
    monkeypatch.setattr(run, "measure_preset", lambda name, *_, **__: {"name": name})
    monkeypatch.setattr(report, "print_document", lambda _: None)
    monkeypatch.setattr(report, "write_page", lambda *_: saved.append(1))
    flags = ["--device", "cpu", "--max-time", "100", "--presets", "nano", "demo", "--out", str(tmp_path)]
    return lambda: (main(flags), len(saved), json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_a_section_that_raises_leaves_a_document_with_the_others(rehearse, monkeypatch):
    def gone(*_):
        raise PeerError("it is gone")

    monkeypatch.setattr(run, "measure_ceilings", lambda: 1 / 0)
    monkeypatch.setattr(run, "add_peer", gone)
    code, saved, document = rehearse()
    assert (code, saved) == (1, 7), "before the first of six sections, and after each"
    assert [table["name"] for table in document["tables"]] == ["nano", "demo"]
    failed = [f"{needs}: PeerError: it is gone" for needs in ("torch", "vllm")]
    assert document["left_out"] == ["ceilings: ZeroDivisionError: division by zero", *failed]
    assert list(document["errors"]) == ["ceilings"], "a peer's trouble is not ours"


def test_a_preset_that_would_take_too_long_is_left_out(rehearse, monkeypatch):
    now = iter(range(0, 999, 12))  # at each look at the clock: `demo` would end at 108 s
    monkeypatch.setattr(run, "clock", lambda: next(now))
    code, _, document = rehearse()
    assert (code, [table["name"] for table in document["tables"]]) == (0, ["nano"])
    assert document["left_out"] == ["demo: no time was left; --max-time gives more"]


def test_a_check_that_raises_fails(monkeypatch):
    def broken(*_):
        yield checks.Check("loss", 0.0, 1.0)
        raise KeyError("embed")

    for name in ("checks_of_training", "check_prefill", "checks_of_serving", "check_greedy"):
        monkeypatch.setattr(run, name, broken)
    found = [(check.name, check.holds) for check in run.all_checks()]
    assert found[:2] == [("nano: loss", True), ("nano, float32: KeyError: 'embed'", False)]
    assert len(found) == 20


def test_rounds_end_in_time():
    assert len(measure({"a": lambda: 1}, rounds=9, until=0.0)["a"].seconds) == MIN_ROUNDS


def test_the_processor_is_there_to_compare_with(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(command, "start_jax", lambda _: Device("cpu", "", 1, os.environ["JAX_PLATFORMS"]))
    assert main([]) == 2
    assert "(cuda,cpu)" in capsys.readouterr().err


def test_a_machine_without_an_accelerator_is_told_so(capsys):
    assert main([]) == 2
    assert "--device cpu rehearses" in capsys.readouterr().err


def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    """The processor's numbers come second: those of one leaf are moved by a thousandth of the largest."""
    monkeypatch.setattr(checks, "TOKENS", 16)
    cfg, cpu, on, calls = tiny_config(), jax.devices("cpu")[0], checks._on, []
    assert all(check.holds for check in checks.checks_of_training(cfg, lively_params(cfg), cpu, cpu))

    def moved(*arguments):
        loss, gradient = on(*arguments)
        calls.append(loss)
        embed = gradient["embed"]
        return loss, gradient | {"embed": embed + 1e-3 * abs(embed).max() * (len(calls) % 2)}

    monkeypatch.setattr(checks, "_on", moved)
    holds = [check.holds for check in checks.checks_of_training(cfg, lively_params(cfg), cpu, cpu)]
    assert holds == [True, False, True, False], "losses hold, gradients do not, packed or not"


def test_a_slot_that_feels_its_neighbours_is_seen(monkeypatch):
    monkeypatch.setattr(checks, "TOKENS", 64)
    cfg = tiny_config()
    assert all(check.holds for check in checks.checks_of_serving(cfg, lively_params(cfg)))
    step = Slots.step

    def felt(self):
        crowded = self.running > 4
        return [e._replace(tokens=[t + crowded for t in e.tokens]) for e in step(self)]

    monkeypatch.setattr(Slots, "step", felt)
    assert [check.holds for check in checks.checks_of_serving(cfg, lively_params(cfg))] == [False, True]


def test_a_number_that_is_none_does_not_hold():
    assert not checks.Check("loss", float("nan"), 1.0).holds


def test_the_batch_fits_the_memory():
    cfg = preset("smollm2-135m")
    batches = [fit("a", cfg, 1024, gigabytes * 10**9)[1] for gigabytes in (12, 40, 80)]
    assert batches == sorted(batches)
    assert fit("a", cfg, 1024, 9 * 10**9)[0].remat == "block"
    with pytest.raises(UserError, match="does not fit"):
        fit("a", cfg, 1024, 10**8)


def test_the_page_shows_what_failed_and_what_is_absent(tmp_path):
    document = {
        "machine": {"device": "a <GPU>", "cores": 1, "jax": "1", "backend": "gpu"}, "price_per_hour": 1.0,
        "ceilings": dict.fromkeys(("bf16_gflops", "f32_gflops", "int8_gflops", "read_gbs"), 1.0),
        "checks": [{"name": "loss", "difference": 0.5, "limit": 0.1, "holds": False}],
        "tables": [], "peers": [], "left_out": ["llama: no time"],
        "absent": [{"name": "vllm", "reason": "none", "install": "x"}],
    }  # fmt: skip
    page = write_page(tmp_path, document).read_text()
    for words in ("a &lt;GPU&gt;", "FAILS", "left out: llama: no time", "absent: vllm"):
        assert words in page
    assert json.loads((tmp_path / "accelerator.json").read_text()) == document
    with pytest.raises(UserError, match="cannot be written"):
        write_page(tmp_path / "accelerator.html" / "x", document)
