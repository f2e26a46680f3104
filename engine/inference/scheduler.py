"""Scheduler: gives sequences slots; chooses between prefilling prompts and decoding others, with draft tokens. Imports no jax.

`engine.Engine` asks `schedule` for the next step, carries it out on the device, and reports with
`record_prefill` and `finish`.
"""

import bisect
import dataclasses
import itertools
import operator
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from engine.inference.request import FinishReason, Request

STEPS = 8  # the most tokens that one dispatch adds to a sequence
TOKENS_PER_DISPATCH = 32  # about, over all slots, or where idle rows cost little over those in use
# of a dispatch, for any number of rows. A cancelled request waits for the dispatch to end
MIN_STEPS = 4
STEPS_BESIDE_PREFILL = 2  # of a dispatch while a prompt is being prefilled
# of a dispatch of a single sequence that has no draft here, and may have one soon
STEPS_BETWEEN_DRAFTS = 4
# every so many chunks one goes to the oldest prompt, the others to the shortest rest
OLDEST_EVERY = 4
DRAFT_ROWS = 3  # rows, beside its own, in which a single sequence may check draft tokens
# How often the token that followed the last 1, 2, ... tokens of a text follows again: where
# measuring begins.
CHANCES = (0.1, 0.35, 0.5, 0.6)
# That a draft token and those before it are right, for checking it to pay. A row adds 0.07 (blocks)
# to 0.12 (int8) of a step's time, and a dispatch of one step 0.15 to 0.3, which the more drafts
# share.
MIN_CHANCE = 0.15
MIN_SHARE = 0.2  # of positions whose first draft token is right, for looking again soon to pay
DECAY = 0.9  # weight of the past in what is measured
PATIENCE = 8  # tokens without one that its grammar forbids, until a sequence runs ahead


class Drafter:
    """Drafts the next tokens of one text, for speculative decoding; measures how often a match of
    each length is right.

    A draft token is what followed the last few tokens earlier in the text (prompt lookup, Saxena
    2023; after Leviathan et al. 2023, 2211.17192). Each idle row samples the token after one draft
    token, with the key of its position: if the drafts before it were right, the token that decoding
    one by one would give, greedy or not.
    """

    def __init__(self, text: Iterable[int]) -> None:
        self._text: list[int] = []
        # a few tokens -> the position after them, the last time
        self._next: dict[tuple[int, ...], int] = {}
        # for each length: tokens right, and expected to be
        self.measured = [[2.0, 2.0] for _ in CHANCES]
        self._share = 2 * MIN_SHARE
        for token in text:
            self._append(token)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            length, draft = self._match(self._text[-len(CHANCES) :])
            self._share = DECAY * self._share + (1 - DECAY) * (draft == token)
            if length:
                right, expected = self.measured[length - 1]
                self.measured[length - 1] = [
                    DECAY * right + (draft == token),
                    DECAY * expected + CHANCES[length - 1],
                ]
            self._append(token)

    def draft(self, count: int) -> list[int]:
        """Returns up to `count` draft tokens: as many as are right often enough for checking them to pay."""
        drafts: list[int] = []
        tail = self._text[-len(CHANCES) :]
        chance = 1.0
        while len(drafts) < count:
            length, token = self._match(tail)
            chance *= self._likelihood(length)
            if chance < MIN_CHANCE:
                break
            drafts.append(token)
            tail = [*tail[1 - len(CHANCES) :], token]
        return drafts

    @property
    def is_worthwhile(self) -> bool:
        return self._share >= MIN_SHARE

    def _append(self, token: int) -> None:
        for length in range(1, min(len(CHANCES), len(self._text)) + 1):
            self._next[tuple(self._text[-length:])] = len(self._text)
        self._text.append(token)

    def _match(self, tail: list[int]) -> tuple[int, int]:
        """Returns how many of the last tokens stood earlier in the text, and what followed them
        there; (0, -1) if none.
        """
        for length in range(len(tail), 0, -1):
            position = self._next.get(tuple(tail[-length:]))
            if position is not None:
                return length, self._text[position]
        return 0, -1

    def _likelihood(self, length: int) -> float:
        if not length:
            return 0.0
        right, expected = self.measured[length - 1]
        return min(CHANCES[length - 1] * right / expected, 1.0)


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request, its priority (the lowest is served first), its slot (-1 while it waits for one),
    the number of its prompt's prefilled tokens, and its output so far.

    `cached_tokens` of those came from the prefix cache, in which `prefix_key` is the last prefilled
    chunk's. `constraint` follows its output through the request's grammar. `stop_token`: the one
    that ended it. `hidden_sum`: for an embedding, over the prefilled tokens. `patience`: tokens
    still to be allowed by its grammar until it runs ahead.
    """

    id: int
    request: Request
    priority: int = 0
    slot: int = -1
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    prefix_key: bytes = b""
    output_tokens: list[int] = dataclasses.field(default_factory=list)
    drafter: Drafter | None = None
    stop_token: int | None = None
    hidden_sum: Any = 0
    patience: int = PATIENCE

    def __post_init__(self) -> None:
        self.constraint = self.request.constraint and self.request.constraint.begin()

    @property
    def runs_ahead(self) -> bool:
        """Whether it is greedy, and PATIENCE tokens were accepted since one that was sampled
        without a mask was rejected: then the next are sampled without masks, and looked at
        afterwards.

        The most probable of all tokens, if it is allowed, is the most probable of those that are.
        """
        sampling = self.request.sampling
        constraint = self.constraint
        is_greedy = sampling.temperature == 0 and not sampling.adjusts_logits
        return constraint is not None and constraint.can_run_ahead and is_greedy and self.patience <= 0

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.id

    @property
    def to_prefill(self) -> int:
        """Prompt tokens left to prefill: all but the last, which decoding reads, if it is to be completed."""
        return len(self.request.prompt) - (not self.request.embed) - self.prefilled_tokens

    @property
    def last_token(self) -> int:
        if self.output_tokens:
            return self.output_tokens[-1]
        return self.request.prompt[-1]

    @property
    def position(self) -> int:
        """The position of `last_token`, where the next decoding step writes."""
        return len(self.request.prompt) - 1 + len(self.output_tokens)

    @property
    def remaining(self) -> int:
        return self.request.sampling.max_tokens - len(self.output_tokens)

    @property
    def stopless_tokens(self) -> int:
        return max(0, self.request.sampling.min_tokens - len(self.output_tokens))

    @property
    def max_positions(self) -> int:
        """The most positions of its slot that may be written, by the last dispatch's surplus too."""
        return len(self.request.prompt) + self.request.sampling.max_tokens + STEPS

    def chunk(self, size: int) -> tuple[tuple[int, ...], int]:
        """Returns the tokens to prefill of the next chunk, and how many of them are there already."""
        done = self.prefilled_tokens % size
        start = self.prefilled_tokens - done
        return self.request.prompt[start : min(start + size, self.prefilled_tokens + self.to_prefill)], done

    def draft_tokens(self, count: int) -> list[int] | None:
        """Returns up to `count` draft tokens, forced by its grammar or looked up; None when they
        have not been right lately.
        """
        self.drafter = self.drafter or Drafter((*self.request.prompt, *self.output_tokens))
        drafts = self.drafter.draft(count)
        if self.constraint:
            return self.constraint.allowed_drafts(drafts, count)
        if not drafts and not self.drafter.is_worthwhile:
            return None
        return drafts

    def accept(
        self, sampled: Iterable[int | None], drafts: list[int] | None = None
    ) -> tuple[list[int], FinishReason | None]:
        """Appends the sampled tokens that count; returns them, and the reason if the sequence ends.

        None: a token whose logits were no numbers. With `drafts`, each token after the first was
        sampled after one of them, and counts only if all drafts up to that one were right; without,
        the tokens are of consecutive steps.
        """
        accepted: list[int] = []
        reason: FinishReason | None = None
        ends = self.request.sampling.stop_token_ids
        for index, token in enumerate(sampled):
            if self.constraint and self.constraint.failed:
                reason = "grammar"
                break
            ran_ahead = index > 0 and not drafts
            if (
                self.constraint
                and ran_ahead
                and token is not None
                and (token in ends or not self.constraint.allows(token))
            ):
                self.patience = PATIENCE + len(accepted)
                break
            if token is None:
                reason = "error"
                break
            if token in ends:
                reason = "stop"
                self.stop_token = token
                break
            accepted.append(token)
            if self.constraint:
                reason = self.constraint.accept(token)
                if reason:
                    break
            if len(accepted) == self.remaining:
                reason = "length"
                break
            if drafts and drafts[index : index + 1] != [token]:
                break
        self.patience -= len(accepted)
        if self.drafter:
            self.drafter.extend(accepted)
        self.output_tokens += accepted
        return accepted, reason


class Prefill(NamedTuple):
    """The step that prefills a chunk of one sequence's prompt."""

    sequence: Sequence


class DecodeRow(NamedTuple):
    """A row of a dispatch: its number, the slot it reads, and the sequence, token and position
    after which it samples.
    """

    row: int
    slot: int
    sequence: Sequence
    token: int
    position: int


class Decode(NamedTuple):
    """The step that decodes `steps` tokens in each row, in one dispatch.

    With `drafts`, by slot, it is a single step, in which other rows sample after one draft token
    each. They share the slot of their sequence, or read `copies`: slots that hold a single
    sequence's text as well, `copies_are_new` if it must be copied there first.
    """

    rows: list[DecodeRow]
    steps: int
    drafts: dict[int, list[int]]
    copies: list[int]
    copies_are_new: bool

    @property
    def sequences(self) -> list[Sequence]:
        return [row.sequence for row in self.rows if row.position == row.sequence.position]

    def renumbered(self) -> "Decode":
        """Returns this with rows numbered from 0, for a program of as many."""
        return self._replace(rows=[row._replace(row=number) for number, row in enumerate(self.rows)])

    def drafts_of(self, sequence: Sequence) -> list[int]:
        return self.drafts.get(sequence.slot, [])

    def rows_of(self, sequence: Sequence) -> list[int]:
        return [row.row for row in self.rows if row.sequence is sequence]

    @property
    def draft_writes(self) -> list[tuple[int, int]]:
        """(row, slot) of each write beside the rows' own, so that a single sequence and its copies
        hold the same text.
        """
        if not self.copies:
            return []
        slots = [self.rows[0].row, *self.copies]
        pairs = itertools.product([row.row for row in self.rows], slots)
        return [(row, slot) for row, slot in pairs if slot != row]


class Scheduler:
    """Sequences in three stages (waiting, prefilling, decoding), and the slots that are free.

    `rows`: of a dispatch, one for each slot, but more for a single slot, which all of them read.
    `shares_slots`: whether any row can read any slot, so that draft tokens need no copies.
    """

    def __init__(self, slots: int, speculate: bool, rows: int, shares_slots: bool) -> None:
        self.slots = slots
        self.speculate = speculate
        self.rows = rows
        self.shares_slots = shares_slots
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.free = list(range(slots))
        self.copies: list[int] = []
        self._submitted = self._chunks = 0
        self._last_was_prefill = False

    @property
    def running(self) -> list[Sequence]:
        return [*self.prefilling, *self.decoding]

    @property
    def spare_rows(self) -> list[int]:
        """The rows that can check draft tokens in the slot of a single sequence."""
        spare = list(range(self.slots, self.rows))
        if self.shares_slots:
            spare += self.free
        return spare

    def submit(self, request: Request, priority: int = 0) -> Sequence:
        self._submitted += 1
        sequence = Sequence(self._submitted, request, priority)
        bisect.insort(self.waiting, sequence, key=operator.attrgetter("order"))
        return sequence

    def admit(self) -> list[Sequence]:
        """Gives free slots to waiting sequences in their order, and returns these."""
        admitted = []
        if self.waiting:
            self._free_copies()
        while self.waiting and self.free:
            sequence = self.waiting.popleft()
            sequence.slot = self.free.pop(0)
            if sequence.to_prefill:
                self.prefilling.append(sequence)
            else:
                self.decoding.append(sequence)
            admitted.append(sequence)
        return admitted

    def schedule(self) -> Prefill | Decode | None:
        """Returns the next step, or None when nothing runs."""
        prefilling = self.prefilling
        decoding = self.decoding
        # prefill: one chunk of one prompt, so that a long prompt delays neither tokens nor shorter
        # prompts
        if prefilling and not (decoding and self._last_was_prefill):
            self._last_was_prefill = True
            self._chunks += 1
            oldest = self._chunks % OLDEST_EVERY == 0
            return Prefill(prefilling[0] if oldest else self.shortest_prompt)

        # decode: a few tokens for every sequence whose prompt is prefilled
        self._last_was_prefill = False
        if not decoding:
            return None
        rows = [DecodeRow(each.slot, each.slot, each, each.last_token, each.position) for each in decoding]
        looked_up = self._draft_tokens()
        drafts = {decoding[0].slot: looked_up} if looked_up else self._forced_tokens(decoding)
        if drafts:
            return self._check_drafts(rows, drafts)
        if not all(sequence.output_tokens and self._runs_ahead(sequence) for sequence in decoding):
            steps = 1  # a grammar's mask is for one token, or a request waits for its first
        elif prefilling:
            steps = STEPS_BESIDE_PREFILL
        elif looked_up is not None:
            steps = STEPS_BETWEEN_DRAFTS
        else:
            in_use = len(decoding) if self.shares_slots else self.slots
            steps = min(STEPS, max(MIN_STEPS, TOKENS_PER_DISPATCH // in_use))
        stopless = [sequence.stopless_tokens for sequence in decoding if sequence.stopless_tokens]
        steps = min(steps, max(sequence.remaining for sequence in decoding), *stopless)
        return Decode(rows, steps, {}, self.copies, False)

    def _check_drafts(self, rows: list[DecodeRow], drafts: dict[int, list[int]]) -> Decode:
        """Returns a step of these rows and of spare ones, or rows of copied slots, which check the
        draft tokens by slot.
        """
        spare = self.spare_rows
        copies_are_new = not (self.copies or spare)
        if copies_are_new:
            self.copies = self.free[:DRAFT_ROWS]
            self.free = self.free[DRAFT_ROWS:]
        free = iter(spare or self.copies)
        checking = []
        for own in rows:
            for n, token in enumerate(drafts.get(own.slot, ()), 1):
                row = next(free)
                slot = own.slot if spare else row
                checking.append(DecodeRow(row, slot, own.sequence, token, own.position + n))
        return Decode([*rows, *checking], 1, drafts, self.copies, copies_are_new)

    def _runs_ahead(self, sequence: Sequence) -> bool:
        """Whether its tokens may be sampled without masks. One that does not count may leave a NaN
        in the slot: kernels, whose rows share slots, read no such position.
        """
        return not sequence.constraint or (self.shares_slots and sequence.runs_ahead)

    @property
    def shortest_prompt(self) -> Sequence:
        return min(self.prefilling, key=operator.attrgetter("to_prefill"))

    def record_prefill(self, sequence: Sequence, count: int) -> None:
        sequence.prefilled_tokens += count
        if not sequence.to_prefill:
            self.prefilling.remove(sequence)
            self.decoding.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, and frees its slot."""
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        else:
            self.decoding.remove(sequence)
        self.free.append(sequence.slot)
        self._free_copies()

    def cancel(self, id: int) -> bool:
        """Drops a sequence. Returns False when there is none of that id."""
        for sequence in (*self.waiting, *self.running):
            if sequence.id == id:
                if sequence in self.waiting:
                    self.waiting.remove(sequence)
                else:
                    self.finish(sequence)
                return True
        return False

    def _draft_tokens(self) -> list[int] | None:
        """Returns draft tokens for a single sequence, as many as free rows can check; None when it
        is not alone, or they have not paid.
        """
        if not self.speculate or len(self.decoding) > 1 or self.prefilling or self.waiting:
            return None
        (sequence,) = self.decoding
        count = min(
            DRAFT_ROWS, len(self.spare_rows) or len(self.free) + len(self.copies), sequence.remaining - 1
        )
        if sequence.request.sampling.adjusts_logits or not sequence.output_tokens or count < 1:
            return None
        return sequence.draft_tokens(count)

    def _forced_tokens(self, decoding: list[Sequence]) -> dict[int, list[int]]:
        """Returns by slot the tokens that constraints force next: sequences share the rows that are
        free to check them.
        """
        spare = len(self.spare_rows) if self.speculate else 0
        forced: dict[int, list[int]] = {}
        constrained = [
            (each, each.constraint)
            for each in decoding
            if each.constraint and not each.request.sampling.adjusts_logits
        ]
        for others, (sequence, constraint) in zip(range(len(constrained), 0, -1), constrained):
            count = min(spare // others, sequence.remaining - 1)
            tokens = constraint.allowed_drafts((), count) if count > 0 else []
            if tokens:
                forced[sequence.slot] = tokens
                spare -= len(tokens)
        return forced

    def _free_copies(self) -> None:
        self.free += self.copies
        self.copies = []
