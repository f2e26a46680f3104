"""Engine: whatever requests come and go, whenever, each completion has the bits that it has alone."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine.errors import InvalidField
from engine.inference.config import MIN_ROWS
from engine.inference.request import Request
from tests.inference.engine_requests import (
    AS_SERVED,
    CAPACITY,
    REQUESTS,
    SLOTS,
    Log,
    attends_by_xla,
    complete_alone,
    make_engine,
    poison,
)
from tests.simulated import check_slots
from tests.tiny import request_of

requests = st.sampled_from(REQUESTS)


class Company(RuleBasedStateMachine):
    """Any requests come and any are cancelled, at any moment, while free slots are filled with rubbish; each that is let
    finish has the completion that it has alone."""

    ids = Bundle("ids")
    dtype = "float32"

    @initialize(
        cache=st.sampled_from([0, 20_000, 10**6]),
        speculate=st.booleans(),
        order=st.permutations(range(SLOTS)),
    )
    def begin(self, cache: int, speculate: bool, order: list[int]) -> None:
        self.engine = make_engine(self.dtype, prefix_cache_bytes=cache, speculate=speculate)
        self.engine.scheduler.free = order
        self.engine.tails_are_exact = True  # as test_inference_engine finds
        self.engine.few_rows = MIN_ROWS if self.engine.config.backend.in_c and self.dtype == AS_SERVED else 0
        self.log, self.cancelled = Log(self.engine), set()

    @rule(target=ids, request=requests)
    def submit(self, request: Request) -> int:
        return self.log.submit(request)

    @rule(request=requests)
    def submit_too_much(self, request: Request) -> None:
        before = self.engine.busy, len(self.engine.scheduler.waiting)
        with pytest.raises(InvalidField, match=f"at most {CAPACITY} fit"):
            self.engine.submit(request_of(request.prompt, CAPACITY + 1 - len(request.prompt)))
        assert (self.engine.busy, len(self.engine.scheduler.waiting)) == before

    @rule(id=consumes(ids))
    def cancel(self, id: int) -> None:
        unfinished = id not in self.log.finished
        assert self.engine.cancel(id) == unfinished
        assert not self.engine.cancel(id)
        if unfinished:
            self.cancelled.add(id)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.log.step()

    @precondition(lambda self: len(self.engine.scheduler.free) > 0)
    @rule(rubbish=st.sampled_from([np.nan, np.inf, -np.inf]))
    def spoil(self, rubbish: float) -> None:
        poison(self.engine, rubbish)

    @invariant()
    def bounds_hold(self) -> None:
        if hasattr(self, "engine"):
            check_slots(self.engine)
            assert not (set(self.log.finished) & self.cancelled)
            assert 0 <= self.engine.used_positions <= SLOTS * CAPACITY

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.log.drain()
        scheduler = self.engine.scheduler
        assert (self.engine.used_positions, scheduler.copies, sorted(scheduler.free)) == (
            0,
            [],
            [*range(SLOTS)],
        )
        assert set(self.log.finished) == set(self.log.requests) - self.cancelled
        for id in self.log.finished:
            assert self.log.completion(id) == complete_alone(self.dtype, self.log.requests[id])


class CompanyOfInt8(Company):
    dtype = "int8"


class CompanyAsServed(Company):
    dtype = AS_SERVED


SOME = settings(max_examples=15, stateful_step_count=30, deadline=None)
Company.TestCase.settings = CompanyOfInt8.TestCase.settings = CompanyAsServed.TestCase.settings = SOME
TestCompany, TestCompanyAsServed = Company.TestCase, CompanyAsServed.TestCase


@pytest.mark.night
class TestCompanyOfInt8(CompanyOfInt8.TestCase):
    """With an int8 KV cache too."""


@pytest.fixture(scope="class")
def by_xla():
    with attends_by_xla():
        yield


# by day test_segmented.py holds that a row's attention by XLA has the same bits in any
# company
@pytest.mark.night
@pytest.mark.usefixtures("by_xla")
class TestCompanyByXla(CompanyAsServed.TestCase):
    """The same without the kernel in C."""


@pytest.mark.law("batch invariance")
def test_the_defaults_of_a_server_are_those_of_the_machine_as_served():
    from engine.inference.config import default_weights
    from stages.serve.flags import ServeFlags

    assert f"{default_weights('cpu')}/{ServeFlags().keys_values}" == AS_SERVED
