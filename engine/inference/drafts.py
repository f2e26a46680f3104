"""Drafter: looks up draft tokens in the text so far of a sequence, and measures how often they are right."""

from collections.abc import Iterable

# If the last 1, 2, ... tokens of a text stood earlier in it, the token that followed them there follows
# again with these probabilities. Measuring begins from them.
CHANCES = (0.1, 0.35, 0.5, 0.6)
# Checking a draft token pays if it and all drafts before it are right with at least this probability. Each
# row adds 0.07 (blocks) to 0.12 (int8) of a step's time. A dispatch of one step adds 0.15 to 0.3, and its
# drafts share that.
MIN_CHANCE = 0.15
# Looking for drafts again soon pays if the first draft token is right at this share of positions or more.
MIN_SHARE = 0.2
# Each new token multiplies the weight of what was measured before by this.
DECAY = 0.9


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
            is_right = draft == token
            self._share = DECAY * self._share + (1 - DECAY) * is_right
            if length:
                right, expected = self.measured[length - 1]
                right = DECAY * right + is_right
                expected = DECAY * expected + CHANCES[length - 1]
                self.measured[length - 1] = [right, expected]
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
