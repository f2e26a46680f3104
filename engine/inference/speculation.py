"""Speculative decoding: draft tokens from the text itself and from what the model usually says, checked by idle rows.

A draft token is what followed the last few tokens earlier in the text (prompt lookup, Saxena 2023; after Leviathan et al.
2023, 2211.17192), or in the answers that a draft was trained on (`engine/ngrams.py`): whichever is right more often in
this text. Each idle row samples the token after one draft token, with the key of its position. If the
drafts before it were right, it is the token that decoding one by one would give, greedy or not.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.ngrams import Answers, NGrams

# How often the token that followed the last 1, 2, ... tokens of a text follows again: where measuring begins.
CHANCES = (0.1, 0.35, 0.5, 0.6)
MIN_CHANCE = 0.15  # that a draft token and those before it are right, for checking it to pay: what a row adds to a step
MIN_SHARE = 0.12  # of places whose first draft token is right, for looking again soon to pay
DECAY = 0.95  # weight of the past in what is measured
TRAINED = 0  # the trained draft among the sources; the others are lengths in a text
Candidate = tuple[int, int, float]  # a source, its token, and how often that is right by itself


class Drafter:
    """Drafts the next tokens of one text; measures how often each source is right."""

    def __init__(self, text: Sequence[int], ngrams: "NGrams | None" = None) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # a few tokens -> the place after them, the last time
        self._ngrams = ngrams
        self._measured = [[2.0, 2.0] for _ in (TRAINED, *CHANCES)]  # of each source: tokens right, and expected to be
        self._share = 2 * MIN_SHARE
        for token in text:
            self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the text, and measures the sources by them."""
        for token in tokens:
            candidates = list(self._candidates(self._text[-len(CHANCES) :]))
            best = max(candidates, key=self._likelihood, default=(0, -1, 0.0))
            self._share = DECAY * self._share + (1 - DECAY) * (best[1] == token)
            for source, draft, chance in candidates:
                right, expected = self._measured[source]
                self._measured[source] = [DECAY * right + (draft == token), DECAY * expected + chance]
            self._append(token)

    def draft(self, count: int) -> list[int]:
        """Returns up to `count` draft tokens: as many as are right often enough for checking them to pay."""
        drafts: list[int] = []
        tail, chance = self._text[-len(CHANCES) :], 1.0
        while len(drafts) < count:
            best = max(self._candidates(tail), key=self._likelihood, default=(0, -1, 0.0))
            chance *= self._likelihood(best)
            token = best[1]
            if chance < MIN_CHANCE:
                break
            drafts.append(token)
            tail = [*tail[1 - len(CHANCES) :], token]
        return drafts

    @property
    def pays(self) -> bool:
        """Whether draft tokens have been right so often lately that it pays to look for more after a step or two."""
        return self._share >= MIN_SHARE

    def _append(self, token: int) -> None:
        for length in range(1, min(len(CHANCES), len(self._text)) + 1):
            self._next[tuple(self._text[-length:])] = len(self._text)
        self._text.append(token)

    def _candidates(self, tail: list[int]) -> Iterator[Candidate]:
        """Yields what each source has for the place after these tokens."""
        for length in range(len(tail), 0, -1):
            if (place := self._next.get(tuple(tail[-length:]))) is not None:
                yield length, self._text[place], CHANCES[length - 1]
                break
        if self._ngrams and (entry := self._ngrams.next_token(tail)):
            yield TRAINED, *entry

    def _likelihood(self, candidate: Candidate) -> float:
        source, _, chance = candidate
        right, expected = self._measured[source]
        return min(chance * right / expected, 1.0)


def tokens_per_step(answers: "Answers", ngrams: "NGrams | None", count: int) -> float:
    """Returns how many tokens a step of a lone sequence gives on these answers, at most 1 + `count`."""
    steps = tokens = 0
    for text, at in answers:
        drafter = Drafter(text[:at], ngrams)
        while at < len(text):
            drafts = drafter.draft(min(count, len(text) - at - 1))
            right = next((n for n, draft in enumerate(drafts) if draft != text[at + n]), len(drafts))
            drafter.extend(text[at : at + right + 1])
            at, steps, tokens = at + right + 1, steps + 1, tokens + right + 1
    return tokens / steps
