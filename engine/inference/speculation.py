"""Speculation: guesses at the next tokens, from the text itself, for a program that has rows to spare.

A text often repeats what it, or its prompt, said before. So the tokens that followed the last place where the text read
as it reads now are a guess at what follows (prompt lookup: Saxena 2023; after Leviathan et al. 2023, 2211.17192). Rows
that nobody uses check a guess: each draws the token after one guessed token, with the key of its own position. Those
draws are exactly what would have been drawn one by one, greedy or not, as long as the guesses before them came true; the
first wrong guess ends what counts. So a guess changes how soon a token comes, never which.
"""

LENGTHS = (4, 3, 2)  # of the end of the text that is looked for, longest first
WORTH = 0.2  # share of guessed tokens that must have come true lately; below it a guess costs more than it brings
MEMORY = 0.85  # weight of the past in that share, a guess


class Guesser:
    """Looks for what a text repeats, and notes how often it guessed right."""

    def __init__(self, text: tuple[int, ...]) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the text went on, the last time it read so
        self._right = 0.5
        self.extend(text)

    def extend(self, tokens: tuple[int, ...] | list[int]) -> None:
        """The text goes on with these tokens."""
        for token in tokens:
            for length in LENGTHS:
                if len(self._text) >= length:
                    self._after[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none where the text has not read so before."""
        for length in LENGTHS:
            found = self._after.get(tuple(self._text[-length:])) if len(self._text) >= length else None
            if found is not None:
                return self._text[found : found + most]
        return []

    def note(self, guessed: int, right: int) -> None:
        """Of `guessed` tokens `right` came true."""
        self._right = MEMORY * self._right + (1 - MEMORY) * right / guessed

    @property
    def pays(self) -> bool:
        """Whether guesses have come true often enough lately to be worth checking."""
        return self._right >= WORTH
