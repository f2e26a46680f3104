"""A row's time is explained only where it is off, and by its own numbers."""

import dataclasses

from bench.rows import Row
from bench.why import ceiling, why
from engine.counting.flops import Flops, Part
from engine.counting.hardware import Ceilings
from engine.counting.walk import Work

HERE = Ceilings("a machine", "cpu", 2, "0", bf16_gflops=1000, f32_gflops=250, int8_gflops=2000, read_gbs=10, update_gbs=20)
FORWARD = Row(
    "evaluation forward", "inference", lambda: None, dict, tokens=100, formula=Flops({"a": Part(forward=10**9)}),
    peak_bytes=0, memory={}, moved=10**6, walker=Work(matmul=10**9, elementwise=10**7),
)  # fmt: skip
STEP = dataclasses.replace(
    FORWARD, name="step", stage="training", formula=Flops({"a": Part(10**9, 0, 10**9, 10**9)}),
    walker=Work(matmul=3 * 10**9, elementwise=10**8), update=10**6, memory={"gradients": 4 * 10**6},
)  # fmt: skip


def test_what_takes_the_time_its_flops_say_needs_no_words():
    assert why(STEP, 0.03, FORWARD, 0.01, HERE) is None
    assert why(FORWARD, 0.01, FORWARD, 0.01, HERE) is None


def test_a_deviation_of_sixteen_percent_is_explained_and_of_fourteen_not():
    assert why(STEP, 0.03 * 1.14, FORWARD, 0.01, HERE) is None
    found = why(STEP, 0.03 * 1.16, FORWARD, 0.01, HERE)
    assert "28 bytes a weight" in found
    assert "1.40" in found.replace("\u202f", " "), "1 M weights at 28 bytes and 20 GB/s are 1.4 ms"


def test_decoding_is_said_to_be_bound_by_memory_when_reading_takes_the_time():
    decode = dataclasses.replace(FORWARD, stage="decode", slots=8, tokens=8, walker=Work(matmul=10**7), moved=10**7)
    bound = why(decode, 0.0012, FORWARD, 0.01, HERE)  # reading takes 1 ms
    assert "bound by memory" in bound
    assert "bound by neither" in why(decode, 0.02, FORWARD, 0.01, HERE)


def test_a_row_is_held_to_the_ceiling_of_its_own_type():
    assert ceiling(FORWARD, HERE) == 1e12
    assert ceiling(dataclasses.replace(FORWARD, dtype="float32"), HERE) == 0.25e12
    assert ceiling(dataclasses.replace(FORWARD, dtype="int8"), HERE) == 2e12
