"""Prints what was tried on the default training run, what each change gave in bits per byte, and whether it was kept.

    python -m bench.recipes

`to`: the recipe that was changed, layers x width. Runs of 180 s on a quiet machine are what counts; runs of equal steps, half
as long, compare changes that cost no time on a busy one, but mislead: 3 x 128 and a momentum of 0.9 were ahead in them, and
behind in whole runs. Two seeds of one recipe differ by up to 0.03. The recipe of today is that of `demo` in
stages/train/recipes.py and engine/model/config.py.
"""

import csv
import dataclasses
import sys
from pathlib import Path

from bench.cli import Json, print_table, run_bench

EXPERIMENTS = Path(__file__).with_name("experiments.csv")


@dataclasses.dataclass(frozen=True)
class RecipesFlags:
    """There are none."""


def show(_: RecipesFlags) -> Json:
    with EXPERIMENTS.open(encoding="utf-8", newline="") as file:
        experiments = list(csv.DictReader(file))
    print_table("The default run", list(experiments[0]), (list(row.values()) for row in experiments), left=2)
    return {"experiments": experiments}


if __name__ == "__main__":
    sys.exit(run_bench("bench.recipes", __doc__, RecipesFlags, show))
