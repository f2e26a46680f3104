"""Sequence: one request from the queue to its last token. Imports no jax."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from engine.inference.request import FinishReason, Request
from engine.inference.speculation import Drafter

PATIENCE = 8  # tokens without one that its grammar forbids, until a sequence runs ahead
STEPS = 8  # the most tokens that one dispatch adds to a sequence


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request, its priority (the lowest is served first), its slot (-1 while it waits for one), the number of its prompt's
    prefilled tokens, and its output so far.

    `cached_tokens` of those came from the prefix cache, in which `prefix_key` is the last prefilled chunk's. `constraint`
    follows its output through the request's grammar. `stop_token`: the one that ended it. `hidden_sum`: for an embedding, over
    the prefilled tokens. `patience`: tokens still to be allowed by its grammar until it runs ahead.
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
        """Whether its grammar allowed the last tokens, so that the next may be sampled without its masks, and looked at then.

        The most probable of all tokens, if it is allowed, is the most probable of those that are.
        """
        sampling, constraint = self.request.sampling, self.constraint
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
        return self.output_tokens[-1] if self.output_tokens else self.request.prompt[-1]

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
        """Returns up to `count` draft tokens, forced by its grammar or looked up; None when they have not been right lately."""
        self.drafter = self.drafter or Drafter((*self.request.prompt, *self.output_tokens))
        drafts = self.drafter.draft(count)
        if self.constraint:
            return self.constraint.allowed_drafts(drafts, count)
        return drafts or ([] if self.drafter.is_worthwhile else None)

    def accept(self, sampled: Iterable[int | None], drafts: list[int] | None = None) -> tuple[list[int], FinishReason | None]:
        """Appends the sampled tokens that count; returns them, and the reason if the sequence ends.

        None: a token whose logits were no numbers. Each token after the first was sampled after one of `drafts`, and counts
        only if all drafts up to that one were right.
        """
        sampled, accepted = list(sampled), list[int]()
        reason: FinishReason | None = None
        for index, token in enumerate(sampled):
            if self.constraint and self.constraint.failed:
                reason = "grammar"
                break
            ends, ran_ahead = self.request.sampling.stop_token_ids, index > 0 and not drafts
            if self.constraint and ran_ahead and token is not None and (token in ends or not self.constraint.allows(token)):
                self.patience = PATIENCE + len(accepted)
                break
            if token is None or token in ends:
                reason, self.stop_token = "error" if token is None else "stop", token
                break
            accepted.append(token)
            if self.constraint and (reason := self.constraint.accept(token)):
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
