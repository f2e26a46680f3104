"""The engine and the server under any schedule: each request gets what it gets alone, on a device made of lists; planted faults
are found.
"""

import contextlib
from types import SimpleNamespace

import pytest

from engine.inference import engine
from engine.inference.meter import Meter
from engine.inference.request import Request
from engine.inference.sampling import make_token_masks
from engine.inference.scheduler import Decode, Scheduler, Sequence
from stages.serve.admission import Admission
from stages.serve.api import app, guard
from stages.serve.engine_thread import EngineThread
from stages.serve.state import ServerState
from tests.simulated import FakeConstraint, FakeRunner, simulate
from tests.simulated_server import simulate_server

SCHEDULES = 500
accept, finish, chunk_key = Sequence.accept, Scheduler.finish, engine.chunk_key
root_key = engine.root_key
count_decode = Meter.count_decode


def finish_and_lose(scheduler, sequence):
    finish(scheduler, sequence)
    scheduler.free.pop()


FAULTS = {
    "a slot is not cleared": (FakeRunner, "clear", lambda *_: None),
    "a copy is not made": (FakeRunner, "copy", lambda *_: None),
    "copies are not freed": (Scheduler, "_free_copies", lambda _: None),
    "every draft is accepted": (
        Sequence,
        "accept",
        lambda sequence, sampled, drafts=None: accept(sequence, sampled),
    ),
    "a chunk's key is its tokens alone": (engine, "chunk_key", lambda parent, tokens: chunk_key(b"", tokens)),
    "a namespace is not in the key": (engine, "root_key", lambda _, adapter: root_key("", adapter)),
    "an adapter is not in the key": (engine, "root_key", lambda namespace, _: root_key(namespace)),
    "an adapter is replaced under a request": (
        engine.Engine,
        "free_adapter_index",
        lambda _, others: 1 if 1 not in others else None,
    ),
    "a row has no adapter": (Request, "adapter_index", 0),
    "a program of few rows has the numbers of all": (Decode, "renumbered", lambda batch: batch),
    "what ran ahead of a grammar counts": (FakeConstraint, "allows", lambda *_: True),
    "a finished sequence's slot is lost": (Scheduler, "finish", finish_and_lose),
    "who is rejected pays": (
        Meter,
        "count_decode",
        lambda meter, sequence, start, kept, computed: count_decode(
            meter, sequence, start, computed, computed
        ),
    ),
    "idle rows are nobody's": (Meter, "count_idle_rows", lambda *_: None),
}


SERVER_FAULTS = {
    "a place is not given back": (Admission, "release", lambda _: None),
    "a place is given to everybody": (Admission, "check", lambda _, sender, *__: sender),
    "a slot stays empty": (
        Admission,
        "__init__",
        lambda self, slots, queue: admission(self, max(1, slots - 1), queue),
    ),
    "the bytes of a body count for ever": (Admission, "remove_bytes", lambda *_: None),
    "who has left is answered": (EngineThread, "submit", lambda *each: submit(*each) and (lambda: None)),
    "who reads nothing is waited for": (app, "SEND_SECONDS", 10_000.0),
    "a log that is full ends a request": (
        guard,
        "contextlib",
        SimpleNamespace(suppress=lambda *_: contextlib.nullcontext()),
    ),
    "an adapter that is gone is still used": (ServerState, "adapter_of", lambda _, model: model.adapter),
    "an adapter's index is free at once": (
        engine.Engine,
        "free_adapter_index",
        lambda _, others: 1 if 1 not in others else None,
    ),
    "a grammar masks nothing": (
        engine.Engine,
        "_masks",
        lambda self, _, R: make_token_masks(R, self.cfg.vocab),
    ),
    "events go to the request before": (
        EngineThread,
        "_deliver",
        lambda self, events: deliver(self, [event._replace(id=max(1, event.id - 1)) for event in events]),
    ),
}
admission, deliver, submit = Admission.__init__, vars(EngineThread)["_deliver"], EngineThread.submit


def simulate_all(run, seeds):
    for seed in seeds:
        run(seed)


@pytest.mark.law("batch invariance")
@pytest.mark.parametrize("run", [simulate, simulate_server])
@pytest.mark.parametrize("block", range(5))
def test_each_request_gets_what_it_gets_alone(run, block):
    simulate_all(run, range(block, SCHEDULES, 5))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((AssertionError, IndexError)):
        simulate_all(simulate, range(SCHEDULES))


@pytest.mark.parametrize("fault", SERVER_FAULTS)
def test_faults_planted_in_the_server_are_found(fault, monkeypatch):
    monkeypatch.setattr(*SERVER_FAULTS[fault])
    with pytest.raises((AssertionError, OSError)):
        simulate_all(simulate_server, range(SCHEDULES))
