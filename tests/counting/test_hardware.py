"""Ceilings are cached by machine; memory limits."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from engine.counting import hardware
from engine.counting.hardware import (
    Ceilings,
    measure_ceilings,
    memory_limit_bytes,
    peak_rss_bytes,
    save_ceilings,
    saved_ceilings,
)
from engine.files import remove

FOUND = Ceilings("a chip", "cpu", 2, "0", 400.0, 200.0, 300.0, 26.0, 40.0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache's folder of ceilings."""
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path))
    return tmp_path / "hardware"


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: b"",
        lambda saved: b"\xff\xfe",
        lambda saved: b"[]",
        lambda saved: b"{}",
        lambda saved: b"[" * 50_000,
        lambda saved: json.dumps(saved | {"load": 10**400}).encode(),
        *(
            lambda saved, field=field: json.dumps(saved | field).encode()
            for field in (
                {"more": 1},
                {"read_gbs": float("nan")},
                {"read_gbs": -1},
                {"bf16_gflops": "fast"},
                {"load": None},
            )
        ),
    ],
)
def test_ceilings_are_read_back_equal_and_damaged_ones_are_not_read(cache, damage):
    assert saved_ceilings() is None
    save_ceilings(FOUND)
    assert saved_ceilings() == FOUND
    [file] = cache.iterdir()
    file.write_bytes(damage(json.loads(file.read_text())))
    assert saved_ceilings() is None
    save_ceilings(FOUND)
    assert saved_ceilings() == FOUND


def test_a_folder_or_a_pipe_in_their_place_is_replaced(cache):
    save_ceilings(FOUND)
    [file] = cache.iterdir()
    for make in (os.mkdir, os.mkfifo):
        remove(file)
        make(file)
        assert saved_ceilings() is None
        save_ceilings(FOUND)
        assert saved_ceilings() == FOUND


@pytest.mark.parametrize("field", ["processor", "flags", "cores", "backend", "kind", "jax"])
def test_another_machine_has_ceilings_of_its_own(cache, monkeypatch, field):
    here = hardware.machine_identity()
    assert set(here) == {"processor", "flags", "cores", "backend", "kind", "jax"}
    save_ceilings(FOUND)
    monkeypatch.setattr(hardware, "machine_identity", lambda: here | {field: "another"})
    assert saved_ceilings() is None
    monkeypatch.setattr(hardware, "machine_identity", lambda: here)
    assert saved_ceilings() == FOUND


def test_ceilings_of_a_busy_machine_are_measured_again_when_it_is_quiet_and_the_higher_rates_are_kept(
    cache, monkeypatch
):
    load = lambda cores_in_use: monkeypatch.setattr(hardware, "_load", lambda: cores_in_use)
    load(3.0)
    low = dataclasses.replace(FOUND, bf16_gflops=100.0, read_gbs=30.0)
    assert save_ceilings(low) == saved_ceilings() == low, "a machine that stays busy is measured once"
    load(1.5)
    assert saved_ceilings() is None
    assert save_ceilings(FOUND) == dataclasses.replace(FOUND, read_gbs=30.0)
    load(0.1)
    assert saved_ceilings() is None
    save_ceilings(low)
    load(0.0)
    assert saved_ceilings() == dataclasses.replace(FOUND, read_gbs=30.0)


def test_a_step_that_reaches_more_of_a_ceiling_than_a_step_can_has_it_measured_again(cache, monkeypatch):
    monkeypatch.setattr(hardware, "_load", lambda: 0.1)
    hardware.doubt_ceilings(0.95)
    assert not cache.exists() or not [*cache.iterdir()]
    save_ceilings(FOUND)
    hardware.doubt_ceilings(0.85)
    assert saved_ceilings() == FOUND
    hardware.doubt_ceilings(0.95)
    assert saved_ceilings() is None
    assert save_ceilings(FOUND) == saved_ceilings() == FOUND


def test_free_memory_is_what_is_available_within_the_limit(monkeypatch):
    assert 2**20 < hardware.free_memory_bytes() < memory_limit_bytes()
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: 2**20)
    assert hardware.free_memory_bytes() == 2**20


def test_measuring_fills_every_rate_and_reports_rounds(monkeypatch):
    monkeypatch.setattr(hardware, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(hardware, "_CPU_SIDE", 512)
    monkeypatch.setattr(hardware, "_CPU_NUMBERS", 2**20)
    reports = []
    rates = measure_ceilings(lambda done, total: reports.append((done, total)))
    assert reports == [(1, 1)]
    assert rates.device
    assert rates.cores >= 1
    for field in dataclasses.fields(Ceilings):
        if field.name.endswith(("gflops", "gbs")):
            assert getattr(rates, field.name) > 0, field.name


def test_an_operation_the_backend_refuses_has_rate_0(monkeypatch):
    def refuse():
        raise hardware.jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    monkeypatch.setattr(hardware, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(hardware, "square_product", lambda dtype: (refuse, 1.0))
    monkeypatch.setattr(hardware, "_streams", lambda numbers: {"read_gbs": int, "update_gbs": int})
    rates = measure_ceilings()
    assert (rates.bf16_gflops, rates.f32_gflops, rates.int8_gflops) == (0, 0, 0)
    assert rates.read_gbs > 0


def test_peak_memory_sees_what_is_held_and_not_what_a_parent_held():
    ballast = b"x" * 2**29
    assert peak_rss_bytes() >= len(ballast)
    show = "from engine.counting.hardware import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    if sys.platform == "linux":
        assert 2**24 < int(child.stdout) < len(ballast)


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (
            12345678,  # of version 2: the tightest group around us
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                "sys/fs/cgroup/outer/inner/memory.max": "max\n",
                "sys/fs/cgroup/outer/memory.max": "12345678\n",
                "sys/fs/cgroup/memory.max": "99999999\n",
            },
        ),
        (
            7654321,  # of version 1
            {
                "proc/self/cgroup": "4:cpu:/box\n3:hugetlb,memory:/box\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "7654321\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
        ),
        # Seen from inside a container it lies at the top.
        (4444444, {"proc/self/cgroup": "0::/host/only\n", "sys/fs/cgroup/memory.max": "4444444\n"}),
        (None, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}),
    ],
)
def test_memory_limit_is_that_of_a_control_group_or_the_machine(tmp_path, limit, files):
    machine = memory_limit_bytes(tmp_path)
    assert machine > 2**28
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit_bytes(tmp_path) == (limit or machine)
