"""Meter: counts what an engine computes and how long it takes, and shares both among its requests.

FLOPs are those of RequestFlops, so that a request's are the same in any company: in a program's
other rows, in other dispatches, after other cuts of its prompt. Seconds are measured. Those of a
dispatch are shared by the tokens that each request had in it.
"""

import time
from collections.abc import Mapping
from typing import Literal

from engine.counting.request_flops import RequestFlops
from engine.inference.scheduler import Sequence


class Meter:
    """Counts for one engine. Its thread writes, and any thread may read.

    `flops`: those of a token. `computes_padding`: whether the program computes what pads a prompt's
    chunk.

    All programs together have computed `request_flops` for tokens that requests got, `dropped_flops`
    for draft tokens that were rejected and tokens after a text's end, and `idle_flops` in rows that
    nobody used. The steps have taken `seconds`.
    """

    def __init__(self, flops: RequestFlops, computes_padding: bool) -> None:
        self.flops = flops
        self.request_flops = 0
        self.dropped_flops = 0
        self.idle_flops = 0
        self.seconds = 0.0
        self._computes_padding = computes_padding
        self._mark = time.perf_counter()
        self._not_shared = 0.0  # seconds

    def count_prefill(self, sequence: Sequence, count: int, size: int) -> None:
        """Counts the next `count` tokens of a prompt, which a program for `size` prefills."""
        start = sequence.prefilled_tokens
        is_adapted = sequence.request.adapter is not None
        is_embedded = sequence.request.embed
        of_tokens = self.flops.embedded if is_embedded else self.flops.prefilled
        self.request_flops += of_tokens(start, start + count, is_adapted)
        if self._computes_padding:
            self.idle_flops += self.flops.idle_prefilled(size - count, is_embedded)

    def count_decode(self, sequence: Sequence, start: int, kept: int, computed: int) -> None:
        """Counts the samples after `computed` tokens of a sequence, at positions from `start` on, of
        which the first `kept` count.
        """
        is_adapted = sequence.request.adapter is not None
        self.request_flops += self.flops.decoded(start, start + kept, is_adapted)
        self.dropped_flops += self.flops.decoded(start + kept, start + computed, is_adapted)

    def count_idle_rows(self, rows: int) -> None:
        """Counts rows of decoding programs that nobody used."""
        self.idle_flops += self.flops.idle_decoded(rows)

    def begin_step(self) -> None:
        self._mark = time.perf_counter()

    def end_step(self) -> None:
        self._not_shared += self._lap()

    def share(self, tokens: Mapping[Sequence, int], part: Literal["prompt", "completion"]) -> None:
        """Adds the seconds since the step began, or since they were last shared, to the sequences', by
        how many `tokens` each had of them.
        """
        seconds = self._lap() + self._not_shared
        self._not_shared = 0.0
        a_token = seconds / sum(tokens.values())
        for sequence, count in tokens.items():
            if part == "prompt":
                sequence.prompt_seconds += count * a_token
            else:
                sequence.completion_seconds += count * a_token

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self._mark
        self._mark = now
        self.seconds += seconds
        return seconds
