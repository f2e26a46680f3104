"""Scheduler: in plain Python, without a model: who is prefilled and decoded first. Its slots: test_simulation.py."""

import pytest

from engine.inference.constraints import ForcedTokens
from engine.inference.scheduler import (
    OLDEST_EVERY,
    STEPS_BETWEEN_DRAFTS,
    Decode,
    Prefill,
    Scheduler,
    Sequence,
)
from tests.tiny import request_of

SLOTS, CHUNK = 5, 16


class Model:
    """Carries out what a scheduler says, with a token for each that is sampled: `next_token(sequence)`."""

    def __init__(self, slots: int = SLOTS, speculate: bool = True, next_token=lambda sequence: 0) -> None:
        self.scheduler = Scheduler(slots, speculate, slots, shares_slots=True)
        self.next_token = next_token
        self.sequences: dict[int, Sequence] = {}
        self.steps: list[Prefill | Decode] = []

    def submit(self, prompt: int, max_tokens: int, constraint: ForcedTokens | None = None) -> int:
        sequence = self.scheduler.submit(request_of(range(prompt), max_tokens, constraint=constraint))
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
                if sequence.accept(sampled, batch.drafts_of(sequence))[1]:
                    self.scheduler.finish(sequence)
        if batch:
            self.steps.append(batch)

    def output(self, id: int) -> int:
        return len(self.sequences[id].output_tokens)


def test_a_long_prompt_holds_nobody_up():
    """Beside prompts of three chunks each a short one is prefilled second at the latest, and
    decoded next.

    Steps prefill and decode in turns: two prefills and the decodes before, between and after them
    make five.
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


@pytest.mark.law("fairness")
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


def test_sequences_share_the_free_rows_to_check_forced_tokens():
    """Beside a plain sequence, which no row is for; more tokens than rows, and fewer."""
    forced = [[1, 2, 3, 4, 5, 6], [7, 8]]
    model = Model(
        slots=6,
        next_token=lambda sequence: (sequence.constraint.tokens if sequence.constraint else range(9))[0],
    )
    plain = model.submit(1, 9)
    ids = [model.submit(1, len(tokens), ForcedTokens(tokens)) for tokens in forced]
    model.scheduler.admit()
    batch = model.scheduler.schedule()
    own = [model.sequences[id].slot for id in (plain, *ids)]
    assert batch.drafts == {own[1]: [1], own[2]: [7]}
    checked = [(row.slot, row.token, row.position) for row in batch.rows[3:]]
    assert checked == [(own[1], 1, 1), (own[2], 7, 1)], (
        "of six rows three are free, and the second has no use for another"
    )
