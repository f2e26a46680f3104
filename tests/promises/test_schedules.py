"""S17: the scheduler is right under any schedule; a failure names its seed, which replays it."""

import concurrent.futures
import itertools
import multiprocessing

import pytest

from tests.promises.figures import exactly
from tests.simulated import simulate
from tests.simulated_server import simulate_server

PARTS, BLOCK = 4, 1_000


def failures(seeds: range) -> list[str]:
    found = []
    for run, seed in itertools.product((simulate, simulate_server), seeds):
        try:
            run(seed)
        except Exception as error:
            found.append(f"{run.__name__}({seed}): {type(error).__name__} {error}")
    return found


@pytest.mark.law("batch invariance")
@pytest.mark.promises(name="S17")
@pytest.mark.parametrize("part", range(PARTS))
def test_any_schedule(part, quick, expect):
    count = 1_000_000 // PARTS // (100 if quick else 1)
    blocks = [
        range(first, min(first + BLOCK, (part + 1) * count))
        for first in range(part * count, (part + 1) * count, BLOCK)
    ]
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = [*itertools.chain.from_iterable(pool.map(failures, blocks))]
    print(*found[:20], sep="\n")
    expect(
        exactly("violations", len(found), 0),
        over=f"{count:,} schedules of the engine, and as many of the server",
    )
