"""Completion: the text of one request as its tokens come, up to the first of its stop strings."""

from collections.abc import Sequence

from engine.text.tokenizer import TextStream


class Completion:
    """Tokens in, text out as early as it is certain not to be part of a stop string.

    A stop string may begin and end inside tokens; the text ends right before the one that is complete first. `stopped`
    is that string, None while there is none.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self._stream = stream
        self._stop = [text for text in stop if text]
        self._held = ""
        self.tokens = 0  # taken, the one that completed a stop string among them
        self.stopped: str | None = None

    def push(self, tokens: Sequence[int]) -> str:
        """The text that becomes certain. Tokens behind a stop string are not taken."""
        certain = []
        for token in tokens:
            if self.stopped is not None:
                break
            self.tokens += 1
            certain.append(self._more(self._stream.push(token)))
        return "".join(certain)

    def close(self) -> str:
        """What was still held when no token follows; empty behind a stop string."""
        if self.stopped is not None:
            return ""
        certain = self._more(self._stream.close())
        if self.stopped is None:
            certain, self._held = certain + self._held, ""
        return certain

    def _more(self, text: str) -> str:
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            end, _, self.stopped = min(found)
            certain, self._held = self._held[: end - len(self.stopped)], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
