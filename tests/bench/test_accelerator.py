"""The accelerator's bench: that it refuses a machine without one, and that its checks and page see what is wrong."""

import json

import jax
import pytest
from tiny import lively_params, tiny_config

from bench.accelerator import checks
from bench.accelerator.__main__ import main
from bench.accelerator.report import write_page
from bench.accelerator.table import fit
from engine.errors import UserError
from engine.inference.slots import Slots
from engine.model.config import preset


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
