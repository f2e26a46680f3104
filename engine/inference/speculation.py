"""Speculative decoding: draft tokens taken from the text itself, checked by rows of the program that are not in use.

A text often repeats itself. So the tokens that followed the last place where the text read as it reads now are a draft of
what follows (prompt lookup decoding: Saxena 2023; after Leviathan et al. 2023, 2211.17192). Each idle row samples the
token behind one draft token, with the key of its own position. As long as the drafts before them came true, those samples
are exactly the tokens that decoding one by one would give, greedy or not: a draft changes how soon a token comes, never which.
"""

from collections.abc import Sequence

LENGTHS = (4, 3, 2)  # of the end of the text that is looked up, longest first
WORTH = 0.2  # share of draft tokens that must have come true lately; below it checking costs more than it brings
MEMORY = 0.85  # weight of the past in that share, for each update


class Drafter:
    """Looks up what a text repeats, and keeps count of how often its drafts came true."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # the last few tokens -> where the text went on, the last time
        self._share = 0.5
        self.extend(text)

    def extend(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        """Appends tokens to the text. `drafts` is what had been drafted for their places."""
        if compared := min(len(drafts), len(tokens)):
            right = next((n for n, (draft, token) in enumerate(zip(drafts, tokens)) if draft != token), compared)
            self._share = MEMORY * self._share + (1 - MEMORY) * right / compared
        for token in tokens:
            for length in LENGTHS:
                if len(self._text) >= length:
                    self._next[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)

    def draft(self, count: int) -> list[int]:
        """Returns up to `count` tokens that may come next; none where the text has not read so before."""
        places = (self._next.get(tuple(self._text[-length:])) for length in LENGTHS)
        place = next((place for place in places if place is not None), len(self._text))
        return self._text[place : place + count]

    @property
    def pays(self) -> bool:
        """Whether drafts have come true often enough lately to be worth checking."""
        return self._share >= WORTH
