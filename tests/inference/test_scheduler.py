"""Scheduler: in plain Python, without a model: every slot has one owner, and every request is served in time."""

from collections.abc import Collection

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from tiny import request_of

from engine.inference.scheduler import DRAFT_ROWS, OLDEST_EVERY, STEPS_BETWEEN_DRAFTS, Decode, Prefill, Scheduler
from engine.inference.sequence import STEPS, Sequence

SLOTS, CHUNK = 5, 16


class Model:
    """Carries out what a scheduler says, with a token for each that is sampled: `next_token(sequence)`."""

    def __init__(self, slots: int = SLOTS, speculate: bool = True, next_token=lambda sequence: 0) -> None:
        self.scheduler = Scheduler(slots, speculate, slots)
        self.next_token = next_token
        self.sequences: dict[int, Sequence] = {}
        self.steps: list[Prefill | Decode] = []

    def submit(self, prompt: int, max_tokens: int) -> int:
        sequence = self.scheduler.submit(request_of(range(prompt), max_tokens))
        self.sequences[sequence.id] = sequence
        return sequence.id

    def step(self) -> None:
        self.scheduler.admit()
        batch = self.scheduler.schedule()
        if isinstance(batch, Prefill):
            self.scheduler.record_prefill(batch.sequence, len(batch.sequence.chunk(CHUNK)[0]))
        elif batch:
            for sequence in batch.sequences:
                rows = sum(row.sequence is sequence for row in batch.rows)
                sampled = [self.next_token(sequence) for _ in range(rows * batch.steps)]
                if sequence.accept(sampled, batch.drafts)[1]:
                    self.scheduler.finish(sequence)
        if batch:
            self.steps.append(batch)

    def output(self, id: int) -> int:
        return len(self.sequences[id].output_tokens)


def check_slots(scheduler: Scheduler, were_held: Collection[int] = ()) -> None:
    """Every slot is one sequence's, a copy of a lone one's, or free; sequences are admitted in order, but for those that are
    held or `were_held` (ids) when others were admitted."""
    owned = [sequence.slot for sequence in scheduler.running]
    assert sorted([*owned, *scheduler.free, *scheduler.copies]) == list(range(scheduler.slots))
    assert not scheduler.copies or len(owned) == 1
    waiting = [sequence.id for sequence in scheduler.waiting]
    assert waiting == sorted(waiting)
    rest = [sequence.id for sequence in scheduler.waiting if not scheduler.is_held(sequence) and sequence.id not in were_held]
    assert not rest or rest[0] > max((s.id for s in scheduler.running if not s.to_repeat), default=0)


class AnyRequests(RuleBasedStateMachine):
    """Requests come and are cancelled at any moment; texts of two tokens repeat themselves, so that drafts come true."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(next_token=lambda sequence: len(sequence.output_tokens) // 3 % 2)
        self.cancelled: set[int] = set()

    @rule(target=ids, prompt=st.integers(1, 60), max_tokens=st.integers(1, 40))
    def submit(self, prompt: int, max_tokens: int) -> int:
        return self.model.submit(prompt, max_tokens)

    @rule(id=consumes(ids))
    def cancel(self, id: int) -> None:
        unfinished = self.model.output(id) < self.model.sequences[id].request.sampling.max_tokens
        assert self.model.scheduler.cancel(id) == unfinished
        assert not self.model.scheduler.cancel(id)
        if unfinished:
            self.cancelled.add(id)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            before, scheduler = len(self.model.steps), self.model.scheduler
            busy = bool(scheduler.waiting or scheduler.running)
            self.model.step()
            assert (len(self.model.steps) > before) == busy, "there is a step exactly while there is work"
            if self.model.steps and isinstance(batch := self.model.steps[-1], Decode):
                self.check_decode(batch)

    def check_decode(self, batch: Decode) -> None:
        assert 1 <= batch.steps <= STEPS
        assert len({row.row for row in batch.rows}) == len(batch.rows), "a row for each slot at most"
        assert len(batch.copies) <= DRAFT_ROWS
        if batch.drafts:
            assert (batch.steps, len(batch.sequences)) == (1, 1)
            assert len(batch.rows) <= 1 + min(len(batch.drafts), len(batch.copies))
            slots = {batch.sequences[0].slot, *batch.copies}
            assert {slot for row, slot in batch.draft_writes if row == batch.rows[0].row} == slots - {batch.rows[0].row}
        else:
            assert [row.row for row in batch.rows] == [sequence.slot for sequence in batch.sequences]

    @invariant()
    def slots_have_one_owner(self) -> None:
        check_slots(self.model.scheduler)

    def teardown(self) -> None:
        scheduler = self.model.scheduler
        while scheduler.waiting or scheduler.running:
            self.model.step()
        assert sorted(scheduler.free) == list(range(SLOTS))
        for id, sequence in self.model.sequences.items():
            if id not in self.cancelled:
                assert self.model.output(id) == sequence.request.sampling.max_tokens


AnyRequests.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyRequests = AnyRequests.TestCase


def test_a_long_prompt_holds_nobody_up():
    """Beside prompts of three chunks each a short one is prefilled second at the latest, and decoded next.

    Steps prefill and decode in turns: two prefills and the decodes before, between and after them make five.
    """
    for wait in range(OLDEST_EVERY + 2):
        model = Model()
        long = [model.submit(3 * CHUNK + 1, 3) for _ in range(3)]
        for _ in range(wait):
            model.step()
        short = model.submit(5, 3)
        for _ in range(5):
            model.step()
        assert model.output(short)
        assert not model.output(long[-1])


def test_short_prompts_do_not_keep_a_long_one_waiting_for_ever():
    model = Model()
    long = model.submit(3 * CHUNK + 1, 3)
    while not model.output(long):
        if len(model.scheduler.running) < SLOTS:
            model.submit(5, 1)
        model.step()
        assert len(model.steps) <= 2 * (3 * OLDEST_EVERY + 2)  # half of them decode


def test_outputs_go_on_while_a_prompt_is_prefilled():
    model = Model()
    first = model.submit(5, 40)
    while not model.output(first):
        model.step()
    model.submit(58, 3)
    for _ in range(3):
        before = model.output(first)
        model.step(), model.step()  # one that prefills, one that decodes
        assert model.output(first) > before


def test_a_lone_text_is_soon_looked_at_again_for_drafts_and_others_take_longer_dispatches():
    def steps(speculate: bool, sequences: int) -> int:
        tokens = iter(range(100, 999))  # no text that repeats itself
        model = Model(speculate=speculate, next_token=lambda _: next(tokens))
        for _ in range(sequences):
            model.submit(1, 60)
        model.step(), model.step()
        return model.steps[1].steps

    assert steps(True, 1) == STEPS_BETWEEN_DRAFTS < steps(True, 2) == steps(False, 1)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=9), st.sampled_from([CHUNK, 2 * CHUNK]))
def test_texts_that_reach_the_limit_are_held_until_it_is_lifted_and_hold_up_no_other(sizes, limit):
    model = Model(next_token=lambda sequence: len(sequence.output_tokens) // 3 % 2)
    scheduler = model.scheduler
    scheduler.limit = limit
    ids = [model.submit(*size) for size in sizes]
    scheduler.admit()
    while scheduler.has_step:
        model.step()
        match model.steps[-1]:
            case Prefill(sequence):
                assert sequence.prefilled_tokens <= limit
            case Decode(rows, steps):
                assert max(row.position for row in rows) + steps <= limit
        scheduler.admit()
    held = sorted(id for id, (prompt, max_tokens) in zip(ids, sizes) if prompt + max_tokens - 1 > limit)
    assert sorted(s.id for s in [*scheduler.waiting, *scheduler.running]) == held
    assert all(scheduler.is_held(s) and not s.to_prefill for s in scheduler.running)
    scheduler.limit, admitted = 99, []
    waiting = [s.id for s in scheduler.waiting]
    while scheduler.has_step:
        admitted += [s.id for s in scheduler.admit()]
        model.step()
    assert admitted == waiting == sorted(waiting)
    assert [model.output(id) for id in ids] == [count for _, count in sizes]


def test_drafts_that_come_true_are_all_accepted_and_a_wrong_one_ends_what_counts():
    sequence = Sequence(0, request_of((1, 2), 9, stop_token_ids=(7,)))
    assert sequence.accept([4, 5, 6, 8], [4, 5, 6]) == ([4, 5, 6, 8], None)
    assert sequence.accept([4, 5, 6, 8], [4, 9, 6]) == ([4, 5], None)
    assert sequence.accept([4, 7, 6, 8], [4, 7, 6]) == ([4], "stop")
    assert sequence.accept([None, 4]) == ([], "error")
    assert sequence.accept([1, 1, 1, 1]) == ([1, 1], "length")
    assert sequence.output_tokens == [4, 5, 6, 8, 4, 5, 4, 1, 1]
