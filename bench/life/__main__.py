"""Shows the life of a model in four columns, weights, data, cost and time, from real runs; and planned for a large model.

    python -m bench.life                                    makes short runs: trains, tunes, serves; two minutes
    python -m bench.life --trained RUN --tuned RUN --log FILE   one life: RUN, a run tuned from it, a server of either
    python -m bench.life --watts 90 --price 0.20 --out DIR  what the machine draws and costs; also writes DIR/life.html

What is not given is made from RUN. Serving needs the extra `serve`; the log is what `stages.serve --log json` prints, kept in
a file. Energy is read from the processor (RAPL) for runs that are made here, where the machine lets it be read, else it is
--watts times seconds.
"""

import dataclasses
import math
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from bench.cli import Json, run_bench
from engine.device import start_jax
from engine.errors import UserError, require_serve_packages

Folder = Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: a short one is made)")]


@dataclasses.dataclass(frozen=True)
class LifeFlags:
    trained: Folder = None
    """A run folder of stages.train."""
    tuned: Folder = None
    """A run folder of stages.finetune, from --trained."""
    log: Folder = None
    """What a server of either printed with --log json."""
    price: float = 0.10
    """Dollars an hour of this machine."""
    watts: float | None = None
    """Watts that this machine draws, where they cannot be read."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no page)")] = None
    """A folder for life.html and life.json."""


def measure_life(flags: LifeFlags) -> Json:
    """Prints the table and returns the document. Raises UserError for a number out of range or a run that cannot be read."""
    for name in ("price", "watts"):
        if (value := getattr(flags, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} must be a number above 0, not {value:g}.")
    for name in ("trained", "tuned", "log"):
        if (path := getattr(flags, name)) and not path.exists():
            raise UserError(f"--{name} {path} is not there.")
    if not flags.trained and (other := "tuned" if flags.tuned else "log" if flags.log else None):
        raise UserError(f"--{other} is a later part of one model's life: give the run that it came from as --trained.")
    if not flags.log:
        require_serve_packages(shlex.join(["bench.life", *sys.argv[1:]]))
    start_jax()
    from bench.life.page import HERE, write_page
    from bench.life.planned import planned_rows
    from bench.life.stages import check_one_life, serving_row, training_row, tuning_row
    from bench.report.templates import environment

    readers = {"trained": training_row, "tuned": tuning_row, "log": serving_row}
    paths: dict[str, Path] = {name: path for name in readers if (path := getattr(flags, name))}
    found = {name: readers[name](path) for name, path in paths.items()}  # before minutes are spent on the others
    check_one_life(paths, found)
    with tempfile.TemporaryDirectory() as name:
        from bench.life import short_runs

        folder, joules = Path(name), dict.fromkeys(readers, 0.0)
        for stage in [name for name in readers if name not in paths]:
            paths[stage], joules[stage] = short_runs.make(stage, paths.get("trained"), folder)
        rows = [found.get(name) or read(paths[name]) for name, read in readers.items()]
    for row, read_joules in zip(rows, joules.values()):
        row["usd"] = row["seconds"] / 3600 * flags.price
        row["joules"] = read_joules or (flags.watts and flags.watts * row["seconds"])
        row["joules_by"] = (
            "RAPL, of the processor" if read_joules else f"assumed {flags.watts:g} W (--watts)" if flags.watts else None
        )
    document: Json = {"rows": rows, "price": flags.price, "even": even_tokens(rows), "large": planned_rows()}
    large = document["large"]["rows"]
    document["even_large"] = 1e6 * large[0]["hours"][1] / large[2]["hours"][1]
    print(environment(HERE).get_template("life.md.j2").render(document))
    if flags.out:
        print(f"the page: {write_page(flags.out, document)}", file=sys.stderr)
    return document


def even_tokens(rows: list[Json]) -> float:
    """Returns the tokens of answers after which serving has taken as long, and so cost as much, as training."""
    training, _, serving = rows
    return training["seconds"] / serving["seconds"] * serving["tokens"]


if __name__ == "__main__":
    sys.exit(run_bench("bench.life", __doc__, LifeFlags, measure_life))
