"""The checks of a device beside the processor: that they see what is wrong."""

from types import SimpleNamespace

import jax
import pytest

from bench.__main__ import StageTableFlags, measure
from bench.cli import run_bench
from bench.stages import checks
from engine.inference.engine import Engine
from tests.tiny import lively_params, tiny_config


def test_a_check_that_raises_fails(monkeypatch):
    def broken(*_):
        yield checks.Check("loss", 0.0, 1.0)
        raise KeyError("embed")

    monkeypatch.setattr(
        checks, "random_model", lambda *_: SimpleNamespace(params=None)
    )  # which no check reads here
    for name in ("check_training", "check_prefill", "check_serving", "check_greedy"):
        monkeypatch.setattr(checks, name, broken)
    found = [(check.name, check.holds) for check in checks.all_checks()]
    assert found[:2] == [("nano, float32: loss", True), ("nano, float32: KeyError: 'embed'", False)]
    assert len(found) == 20


def test_a_failed_check_is_printed_and_is_exit_code_1(monkeypatch, capsys):
    """The device here is the processor itself: enough for the command's way."""
    for difference, code in ((0.0, 0), (2.0, 1)):
        monkeypatch.setattr(
            checks, "all_checks", lambda difference=difference: [checks.Check("loss", difference, 1.0)]
        )
        assert run_bench("bench", "", StageTableFlags, measure, ["--checks"]) == code
        assert ("FAILS" in capsys.readouterr().out) == bool(code)


@pytest.mark.whole
def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    """The processor's numbers come second: those of one leaf are moved by a thousandth of the largest."""
    monkeypatch.setattr(checks, "TOKENS", 16)
    cfg, cpu, on, calls = tiny_config(), jax.devices("cpu")[0], checks.on_device, []
    assert all(check.holds for check in checks.check_training(cfg, lively_params(cfg), cpu, cpu))

    def moved(*arguments):
        loss, gradient = on(*arguments)
        calls.append(loss)
        embed = gradient["embed"]
        return loss, gradient | {"embed": embed + 1e-3 * abs(embed).max() * (len(calls) % 2)}

    monkeypatch.setattr(checks, "on_device", moved)
    holds = [check.holds for check in checks.check_training(cfg, lively_params(cfg), cpu, cpu)]
    assert holds == [True, False, True, False], "losses hold, gradients do not, packed or not"


@pytest.mark.whole
def test_a_slot_that_feels_its_neighbours_is_seen(monkeypatch):
    monkeypatch.setattr(checks, "TOKENS", 64)
    cfg = tiny_config()
    assert all(check.holds for check in checks.check_serving(cfg, lively_params(cfg), None, None))
    step = Engine.step

    def felt(self):
        crowded = self.running > 4
        return [e._replace(tokens=[t + crowded for t in e.tokens]) for e in step(self)]

    monkeypatch.setattr(Engine, "step", felt)
    assert [check.holds for check in checks.check_serving(cfg, lively_params(cfg), None, None)] == [
        False,
        True,
    ]
