"""Ranges of batches that a run leaves out: the batch of a step is a function of the step and these ranges alone."""

import re

from engine.errors import UserError

Ranges = tuple[tuple[int, int], ...]  # (first, last) batch of each, both left out; in order and apart


def parse_ranges(text: str) -> Ranges:
    """Parses '120..129' or '3..3,120..129'. Raises UserError for anything else."""
    pairs = [re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", part) for part in text.replace(" ", "").split(",")]
    ranges = [(int(pair[1]), int(pair[2])) for pair in pairs if pair]
    if len(ranges) < len(pairs) or any(first > last for first, last in ranges):
        raise UserError(f"wanted the first and the last batch to skip, such as 120..129 or 3..3,120..129, got {text!r}")
    return join_ranges(ranges)


def join_ranges(ranges: list[tuple[int, int]]) -> Ranges:
    """Returns the ranges in order, with those that touch joined."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def format_ranges(ranges: Ranges) -> str:
    """Returns the text that `parse_ranges` reads; empty for none."""
    return ",".join(f"{first}..{last}" for first, last in ranges)


def batch_of_step(step: int, skipped: Ranges) -> int:
    """Returns which batch of the order step `step` reads: the one after `step` others that are not skipped."""
    for first, last in skipped:
        if step >= first:
            step += last - first + 1
    return step


def replace_unread(skipped: Ranges, wanted: Ranges, step: int) -> tuple[Ranges, Ranges]:
    """Returns (ranges, refused): `wanted` in place of those `skipped` that lie ahead of a run at `step`.

    `refused`: the batches of `wanted` that were read already, which cannot be undone.
    """
    unread = batch_of_step(step - 1, skipped) + 1 if step else 0
    passed = [(first, min(last, unread - 1)) for first, last in skipped if first < unread]
    ahead = [(max(first, unread), last) for first, last in wanted if last >= unread]
    behind = [(first, min(last, unread - 1)) for first, last in wanted if first < unread]
    for first, last in passed:  # a range may have more batches than memory has room for
        parts = [part for low, high in behind for part in ((low, min(high, first - 1)), (max(low, last + 1), high))]
        behind = [(low, high) for low, high in parts if low <= high]
    return join_ranges(passed + ahead), join_ranges(behind)
