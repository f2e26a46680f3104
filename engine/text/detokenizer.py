"""Tokens to text as they come: whole characters, up to a stop string."""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Decodes tokens one by one into whole characters, which join to `decode(ids)` without the part
    of one at its end.
    """

    def __init__(self, table: dict[int, bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table.get(int(token), b""))


class CompletionText:
    """Turns tokens into text, returned once it is certain not to be part of a stop string.

    Stop strings may begin and end inside tokens; the text ends before the one that is complete
    first, `stopped`. `tokens` counts those read, the one that completed the stop string included.
    """

    def __init__(self, stream: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._stream = stream
        self._stop = [text for text in stop if text]
        self._uncertain = ""
        self.tokens = 0
        self.stopped: str | None = None

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """Returns the text that is certain now; with the last tokens the rest, without half a character."""
        certain = []
        for token in tokens:
            if self.stopped is not None:
                break
            self.tokens += 1
            certain.append(self._append(self._stream.push(token)))
        if last:
            certain.append(self._uncertain)
        return "".join(certain)

    def _append(self, text: str) -> str:
        text = self._uncertain + text
        # where each stop string is complete; of those that end together the longest comes first
        matches = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if matches:
            end, _, self.stopped = min(matches)
            self._uncertain = ""
            return text[: end - len(self.stopped)]
        certain = len(text) - max((overlap(text, stop) for stop in self._stop), default=0)
        self._uncertain = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text may begin a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
