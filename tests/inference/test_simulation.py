"""The engine under any schedule: each request gets what it gets alone, on a device made of lists; planted faults are found."""

import pytest
from simulated import FakeRunner, simulate

from engine.inference import engine
from engine.inference.request import Request
from engine.inference.scheduler import Scheduler
from engine.inference.sequence import Sequence

SCHEDULES = 500
accept, restart, finish, chunk_key = Sequence.accept, Sequence.restart, Scheduler.finish, engine.chunk_key
root_key = engine.root_key
begin = Sequence.__post_init__


def restart_half(sequence):
    prefilled = sequence.prefilled_tokens
    restart(sequence)
    sequence.prefilled_tokens = prefilled


def restart_silently(sequence):
    restart(sequence)
    sequence.to_repeat = 0


def begin_once(sequence):
    if not hasattr(sequence, "constraint"):
        begin(sequence)


def finish_and_lose(scheduler, sequence):
    finish(scheduler, sequence)
    scheduler.free.pop()


FAULTS = {
    "a slot is not cleared": (engine.Engine, "_clear", lambda *_: False),
    "a copy is not made": (FakeRunner, "copy", lambda *_: None),
    "copies are not freed": (Scheduler, "_free_copies", lambda _: None),
    "every draft is accepted": (Sequence, "accept", lambda sequence, sampled, drafts=None: accept(sequence, sampled)),
    "a chunk's key is its tokens alone": (engine, "chunk_key", lambda parent, tokens: chunk_key(b"", tokens)),
    "a namespace is not in the key": (engine, "root_key", lambda _, adapter: root_key("", adapter)),
    "an adapter is not in the key": (engine, "root_key", lambda namespace, _: root_key(namespace)),
    "an adapter is replaced under a request": (
        engine.Engine,
        "free_adapter_index",
        lambda _, others: 1 if 1 not in others else None,
    ),
    "a row has no adapter": (Request, "adapter_index", 0),
    "a restart keeps the count of what was prefilled": (Sequence, "restart", restart_half),
    "a restart forgets what was sent": (Sequence, "restart", restart_silently),
    "a restart goes on in the grammar": (Sequence, "__post_init__", begin_once),
    "a held text is decoded": (Scheduler, "is_held", lambda *_: False),
    "a finished sequence's slot is lost": (Scheduler, "finish", finish_and_lose),
}


def simulate_all(seeds):
    for seed in seeds:
        simulate(seed)


@pytest.mark.parametrize("block", range(10))
def test_each_request_gets_what_it_gets_alone(block):
    simulate_all(range(block, SCHEDULES, 10))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((AssertionError, IndexError)):
        simulate_all(range(SCHEDULES))
