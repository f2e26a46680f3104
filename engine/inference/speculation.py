"""Speculative decoding by prompt lookup: draft tokens from the text itself, checked by idle rows.

The tokens that followed the last few tokens earlier in the text are the draft (Saxena 2023; after Leviathan et al. 2023,
2211.17192). Each idle row samples the token after one draft token, with the key of its position. If the drafts before it
were right, it is the token that decoding one by one would give, greedy or not.
"""

from collections.abc import Sequence

LENGTHS = (4, 3, 2)  # tokens at the end of the text that are looked up, longest first
MIN_ACCEPTANCE = 0.2  # least acceptance rate of recent draft tokens for checking to pay
DECAY = 0.85  # weight of the past in that rate


class Drafter:
    """Drafts the next tokens of one text; tracks how many were right."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # a few tokens -> the place after them, the last time
        self._acceptance = 0.5
        self.extend(text)

    def extend(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> None:
        """Appends tokens to the text. `drafts` are those drafted for their places."""
        if compared := min(len(drafts), len(tokens)):
            right = next((n for n, (draft, token) in enumerate(zip(drafts, tokens)) if draft != token), compared)
            self._acceptance = DECAY * self._acceptance + (1 - DECAY) * right / compared
        for token in tokens:
            for length in LENGTHS:
                if len(self._text) >= length:
                    self._next[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)

    def draft(self, count: int) -> list[int]:
        """Returns up to `count` draft tokens; none where the text does not repeat itself."""
        places = (self._next.get(tuple(self._text[-length:])) for length in LENGTHS)
        place = next((place for place in places if place is not None), len(self._text))
        return self._text[place : place + count]

    @property
    def pays(self) -> bool:
        """Whether checking drafts pays, by their recent acceptance rate."""
        return self._acceptance >= MIN_ACCEPTANCE
