"""A row's time is explained only where it is off, and by its own numbers."""

import dataclasses

from bench.stages import estimate as explain
from bench.stages.rows import Row
from engine.counting.flops import Flops, PassFlops
from engine.counting.hardware import Ceilings
from engine.counting.jaxpr import JaxprCost

HERE = Ceilings("a machine", "cpu", 2, "0", bf16_gflops=1000, f32_gflops=250, int8_gflops=2000, read_gbs=10, update_gbs=20)
FORWARD = Row(
    "evaluation forward", "inference", lambda: None, dict, tokens=100, formula=Flops({"a": PassFlops(forward=10**9)}),
    peak_bytes=0, memory={}, traffic=10**6, walker=JaxprCost(matmul=10**9, elementwise=10**7),
)  # fmt: skip
STEP = dataclasses.replace(
    FORWARD, name="step", stage="training", formula=Flops({"a": PassFlops(10**9, 0, 10**9, 10**9)}),
    walker=JaxprCost(matmul=3 * 10**9, elementwise=10**8), update=10**6, memory={"gradients": 4 * 10**6},
)  # fmt: skip


def plain(words):
    return words and words.replace("\u202f", " ")


def explain_time(*numbers):
    return plain(explain.explain_time(*numbers))


def explain_peak(row):
    return plain(explain.explain_peak(row))


def test_a_deviation_of_sixteen_percent_is_explained_and_of_fourteen_not():
    assert explain_time(STEP, 3e-4 * 1.14, FORWARD, 1e-4, HERE) is None
    result = explain_time(STEP, 3e-4 * 1.16, FORWARD, 1e-4, HERE)
    assert "28 bytes a trainable weight, 1.40 ms of 34.8 ms" in result, "1 M weights at 28 bytes and 20 GB/s are 1.4 ms"
    assert "at 9% of what this machine multiplies, the forward pass's at 10%" in result


def test_decoding_is_said_to_be_bound_by_what_takes_half_of_its_time():
    decode = dataclasses.replace(FORWARD, stage="decode", slots=8, tokens=8, walker=JaxprCost(matmul=10**7), traffic=10**7)
    words = lambda step, alone: explain_time(decode, step / 8, FORWARD, 1e-4, HERE, alone / 8)  # reading takes 1 ms
    assert "bound by memory" in words(0.0012, 0.0011)
    assert "bound by products of few rows" in words(0.02, 0.011)
    assert "bound by its caches" in words(0.02, 0.009)
    assert "the rest 11.0 ms" in words(0.02, 0.009)
    assert "take as long" in words(0.02, 0.021)


def test_what_multiplies_nothing_is_said_to_copy():
    result = dataclasses.replace(FORWARD, formula=Flops({}), walker=JaxprCost(), traffic=100 * 2048)
    assert explain_time(result, 1e-6, FORWARD, 1e-4, HERE).startswith("nothing is multiplied: 2.05 kB a token")
    assert result.utilisation_of == "MBU"


def test_a_peak_that_is_off_is_explained_either_way():
    row = dataclasses.replace(FORWARD, memory={"params": 80, "activations": 20}, peak_bytes=114)
    assert explain_peak(row) is None
    assert explain_peak(dataclasses.replace(row, peak_bytes=120)).startswith("20.0 B more")
    assert explain_peak(dataclasses.replace(row, peak_bytes=80)).startswith("20.0 B less")
    assert explain_peak(dataclasses.replace(row, peak_bytes=None)) is None
