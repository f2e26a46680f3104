"""Whom this process shares its cores with."""

import os
from types import SimpleNamespace

import pytest

from engine import processor

STAT = """cpu  9000 0 0 9000 0 0 0 0 0 0
cpu0 300 20 50 600 10 5 15 100 7 0
cpu1 9000 0 0 9000 0 0 0 0 0 0
cpu2 500 0 0 400 0 0 0 0 0 0
cpu20 9000 0 0 9000 0 0 0 0 0 0
intr 1 2 3
"""


def read(monkeypatch: pytest.MonkeyPatch, text: str | OSError) -> processor.CoreTime | None:
    def read_text() -> str:
        if isinstance(text, OSError):
            raise text
        return text

    monkeypatch.setattr(processor, "Path", lambda _: SimpleNamespace(read_text=read_text))
    return processor.core_time()


def test_others_are_all_that_used_this_processs_cores_but_itself(monkeypatch):
    """Another virtual machine is among them (steal); a guest's time is counted in the user's already."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(os, "times", lambda: (1.0, 0.5, 0.25, 0.25, 99.0))
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    assert read(monkeypatch, STAT) == processor.CoreTime(total=20.0, others=9.9 - 2.0)


@pytest.mark.parametrize("text", ["", "cpu0 0 0 0 0 0 0 0 0 0 0\n", "cpu0 1 2\n", FileNotFoundError()])
def test_a_system_that_does_not_say_is_no_error(text, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert read(monkeypatch, text) is None
    monkeypatch.delattr(os, "sched_getaffinity")
    assert read(monkeypatch, STAT) is None
