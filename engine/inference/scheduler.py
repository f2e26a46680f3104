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

from engine.inference.drafts import Drafter
from engine.inference.request import FinishReason, Request

# One dispatch adds at most this many tokens to a sequence.
STEPS = 8
# A dispatch decodes about this many tokens over all slots. Where an idle row costs little, only the slots in
# use are counted.
TOKENS_PER_DISPATCH = 32
# A dispatch over many slots still takes this many steps, if no other rule makes it shorter. A cancelled
# request waits for the dispatch to end.
MIN_STEPS = 4
# While a prompt is being prefilled, a dispatch takes this many steps.
STEPS_BESIDE_PREFILL = 2
# If a single sequence has no draft token now, but may soon have one, a dispatch takes this many steps.
STEPS_BETWEEN_DRAFTS = 4
# One of this many prompt chunks goes to the oldest prompt. The others go to the prompt with the least left.
OLDEST_EVERY = 4
# A single sequence checks draft tokens in at most this many rows beside its own.
DRAFT_ROWS = 3
# A sequence runs ahead of its grammar once this many tokens were accepted since the last rejected one.
PATIENCE = 8


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request on its way: its slot, how far its prompt is prefilled, and its output so far.

    `constraint` follows the output through the request's grammar, if it has one.
    """

    id: int
    request: Request
    priority: int = 0  # the lowest is served first
    slot: int = -1  # -1 while it waits for one
    prefilled_tokens: int = 0  # of the prompt
    cached_tokens: int = 0  # of those, from the prefix cache
    prefix_key: bytes = b""  # of the last prefilled chunk in the prefix cache
    output_tokens: list[int] = dataclasses.field(default_factory=list)
    drafter: Drafter | None = None  # made when draft tokens are first wanted
    stop_token: int | None = None  # that ended the output
    hidden_sum: Any = 0  # for an embedding: the head's input, summed over the prefilled tokens
    prompt_seconds: float = 0.0  # its share of the engine's, to prefill
    completion_seconds: float = 0.0  # and to decode
    patience: int = PATIENCE  # tokens still to be allowed by its grammar until it runs ahead

    def __post_init__(self) -> None:
        self.constraint = self.request.constraint and self.request.constraint.begin()

    @property
    def runs_ahead(self) -> bool:
        """Whether the next tokens may be sampled without the grammar's mask, and checked against the
        grammar afterwards.

        This is exact for a greedy sequence: if the most probable of all tokens is allowed, it is
        also the most probable of the allowed ones. It pays only while few tokens are rejected, so
        PATIENCE tokens must have been accepted since the start and since the last rejected one.
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
        """Prompt tokens left to prefill. Decoding reads a prompt's last token, so prefilling leaves
        it out, except where only the embedding is asked for.
        """
        count = len(self.request.prompt)
        if not self.request.embed:
            count -= 1
        return count - self.prefilled_tokens

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
        """Returns the tokens of the first chunk that is not prefilled to its end, and how many of
        them are prefilled already.
        """
        done = self.prefilled_tokens % size
        start = self.prefilled_tokens - done
        end = min(start + size, self.prefilled_tokens + self.to_prefill)
        return self.request.prompt[start:end], done

    def draft_tokens(self, count: int) -> list[int]:
        """Returns up to `count` draft tokens, forced by its grammar or looked up."""
        if self.drafter is None:
            self.drafter = Drafter((*self.request.prompt, *self.output_tokens))
        drafts = self.drafter.draft(count)
        if self.constraint:
            return self.constraint.allowed_drafts(drafts, count)
        return drafts

    @property
    def may_draft_soon(self) -> bool:
        """Whether looking for draft tokens again soon pays: its grammar may force some, or the
        looked-up ones have been right lately.
        """
        if self.constraint:
            return True
        return self.drafter is not None and self.drafter.is_worthwhile

    def accept(
        self, sampled: Iterable[int | None], drafts: list[int] | None = None
    ) -> tuple[list[int], FinishReason | None]:
        """Appends the sampled tokens that count; returns them, and the reason if the sequence ends.

        A sampled None is a token whose logits were no numbers. With `drafts`, each token after the
        first was sampled after one of them, and counts only if all drafts up to that one were
        right. Without drafts the tokens are of consecutive steps.
        """
        accepted: list[int] = []
        reason: FinishReason | None = None
        ends = self.request.sampling.stop_token_ids
        for index, token in enumerate(sampled):
            if self.constraint and self.constraint.failed:
                reason = "grammar"
                break
            # Only a dispatch's first step has the grammar's mask. With drafts there is no other step.
            is_masked = index == 0 or bool(drafts)
            if not is_masked and self._is_out_of_grammar(token):
                # PATIENCE from here on: the accepted tokens are subtracted below.
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
            reason = self._end_after(token, len(accepted))
            if reason:
                break
            if drafts:
                # The next token was sampled after a draft, if one is left. It counts if that is this token.
                is_right = index < len(drafts) and drafts[index] == token
                if not is_right:
                    break
        self.patience -= len(accepted)
        if self.drafter:
            self.drafter.extend(accepted)
        self.output_tokens += accepted
        return accepted, reason

    def _end_after(self, token: int, count: int) -> FinishReason | None:
        """Follows the grammar by an accepted token, the `count`th of a dispatch. Returns why the
        sequence ends with it, or None.
        """
        if self.constraint:
            reason = self.constraint.accept(token)
            if reason:
                return reason
        if count == self.remaining:
            return "length"
        return None

    def _is_out_of_grammar(self, token: int | None) -> bool:
        """Whether a token that was sampled without the grammar's mask is to be sampled again with it.

        A stop token always is: only the mask says whether the grammar may end here. None is not: it
        ends the sequence.
        """
        if self.constraint is None or token is None:
            return False
        if token in self.request.sampling.stop_token_ids:
            return True
        return not self.constraint.allows(token)


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
        # Rows that check draft tokens are at later positions. Without them each sequence comes once.
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
        self._submitted = 0
        self._chunks = 0
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
            if self._chunks % OLDEST_EVERY == 0:
                return Prefill(prefilling[0])
            return Prefill(self.shortest_prompt)

        # decode: a few tokens for every sequence whose prompt is prefilled
        self._last_was_prefill = False
        if not decoding:
            return None
        rows = []
        for sequence in decoding:
            rows.append(
                DecodeRow(
                    row=sequence.slot,
                    slot=sequence.slot,
                    sequence=sequence,
                    token=sequence.last_token,
                    position=sequence.position,
                )
            )
        drafts: dict[int, list[int]] = {}
        count = self._draft_count()
        if count > 0:
            (single,) = decoding
            tokens = single.draft_tokens(count)
            if tokens:
                drafts = {single.slot: tokens}
        if not drafts:
            drafts = self._forced_tokens(decoding)
        if drafts:
            return self._check_drafts(rows, drafts)
        may_draft_soon = count > 0 and decoding[0].may_draft_soon
        return Decode(rows, self._steps(may_draft_soon), drafts={}, copies=self.copies, copies_are_new=False)

    def _steps(self, may_draft_soon: bool) -> int:
        """Returns how many steps the next dispatch takes, if it checks no draft tokens."""
        decoding = self.decoding
        if not all(sequence.output_tokens and self._runs_ahead(sequence) for sequence in decoding):
            # A grammar's mask is for one token, or a request waits for its first token.
            steps = 1
        elif self.prefilling:
            steps = STEPS_BESIDE_PREFILL
        elif may_draft_soon:
            steps = STEPS_BETWEEN_DRAFTS
        else:
            slots = self.slots
            if self.shares_slots:
                slots = len(decoding)
            steps = min(STEPS, max(MIN_STEPS, TOKENS_PER_DISPATCH // slots))
        steps = min(steps, max(sequence.remaining for sequence in decoding))
        # Stop tokens are masked for a whole dispatch, so it ends where a sequence may first sample one.
        for sequence in decoding:
            if sequence.stopless_tokens > 0:
                steps = min(steps, sequence.stopless_tokens)
        return steps

    def _check_drafts(self, rows: list[DecodeRow], drafts: dict[int, list[int]]) -> Decode:
        """Returns a step of these rows and of spare ones, or rows of copied slots, which check the
        draft tokens by slot.
        """
        spare = self.spare_rows
        copies_are_new = not self.copies and not spare
        if copies_are_new:
            self.copies = self.free[:DRAFT_ROWS]
            self.free = self.free[DRAFT_ROWS:]
        free = iter(spare or self.copies)
        checking = []
        for own in rows:
            for n, token in enumerate(drafts.get(own.slot, ()), 1):
                row = next(free)
                slot = own.slot
                if not spare:
                    slot = row  # a copy's slot has a row of its own
                checking.append(DecodeRow(row, slot, own.sequence, token, own.position + n))
        return Decode([*rows, *checking], 1, drafts=drafts, copies=self.copies, copies_are_new=copies_are_new)

    def _runs_ahead(self, sequence: Sequence) -> bool:
        """Whether the sequence's next tokens may be sampled without a grammar's mask.

        A token that is rejected afterwards may leave a NaN in the slot. Kernels, whose rows share
        slots, never read beyond the sequence's own positions; other programs do.
        """
        if not sequence.constraint:
            return True
        return self.shares_slots and sequence.runs_ahead

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

    def _draft_count(self) -> int:
        """Returns how many draft tokens of a single sequence may be looked up and checked: 0 when it
        is not alone.
        """
        if not self.speculate or len(self.decoding) > 1 or self.prefilling or self.waiting:
            return 0
        (sequence,) = self.decoding
        if sequence.request.sampling.adjusts_logits or not sequence.output_tokens:
            return 0
        rows = len(self.spare_rows)
        if rows == 0:
            rows = len(self.free) + len(self.copies)
        return min(DRAFT_ROWS, rows, sequence.remaining - 1)

    def _forced_tokens(self, decoding: list[Sequence]) -> dict[int, list[int]]:
        """Returns by slot the tokens that constraints force next: sequences share the rows that are
        free to check them.
        """
        if not self.speculate:
            return {}
        spare = len(self.spare_rows)
        forced: dict[int, list[int]] = {}
        constrained = [
            (each, each.constraint)
            for each in decoding
            if each.constraint and not each.request.sampling.adjusts_logits
        ]
        for index, (sequence, constraint) in enumerate(constrained):
            # This sequence and those after it share the rows that are left.
            sharing = len(constrained) - index
            count = min(spare // sharing, sequence.remaining - 1)
            if count < 1:
                continue
            tokens = constraint.allowed_drafts((), count)
            if tokens:
                forced[sequence.slot] = tokens
                spare -= len(tokens)
        return forced

    def _free_copies(self) -> None:
        self.free += self.copies
        self.copies = []
