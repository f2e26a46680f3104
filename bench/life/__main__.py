"""Shows the life of a model in four columns, weights, data, cost and time, from real runs; and planned for a large model.

    python -m bench.life                                    makes short runs: trains, tunes, serves; two minutes
    python -m bench.life --trained RUN --tuned RUN --log FILE   takes those that are there, and makes what is not given
    python -m bench.life --watts 90 --price 0.20 --out DIR  what the machine draws and costs; also writes DIR/life.html

The log is what `stages.serve --log json` prints, kept in a file. Energy is read from the processor (RAPL) for runs that are
made here, where the machine lets it be read, else it is --watts times seconds.
"""

import dataclasses
import math
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from bench.cli import Json, check_out, run_bench
from engine.device import start_jax
from engine.errors import UserError
from engine.format import ABSENT, duration, in_words, money, quantity, si

HEADS = ("weights", "data", "cost", "time")
Folder = Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: a short one is made)")]


@dataclasses.dataclass(frozen=True)
class LifeFlags:
    trained: Folder = None
    """A run folder of stages.train."""
    tuned: Folder = None
    """A run folder of stages.finetune."""
    log: Folder = None
    """What a server printed with --log json."""
    price: float = 0.10
    """Dollars an hour of this machine."""
    watts: float | None = None
    """Watts that this machine draws, where they cannot be read."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no page)")] = None
    """A folder for life.html."""


def measure_life(flags: LifeFlags) -> Json:
    """Prints the table and returns the document. Raises UserError for a number out of range or a run that cannot be read."""
    for name in ("price", "watts"):
        if (value := getattr(flags, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} must be a number above 0, not {value:g}.")
    for name in ("trained", "tuned", "log"):
        if (path := getattr(flags, name)) and not path.exists():
            raise UserError(f"--{name} {path} is not there.")
    check_out(flags.out)
    start_jax()
    from bench.life.planned import planned_rows
    from bench.life.stages import serving_row, training_row, tuning_row

    readers = {"trained": training_row, "tuned": tuning_row, "log": serving_row}
    paths: dict[str, Path] = {name: path for name in readers if (path := getattr(flags, name))}
    found = {name: readers[name](path) for name, path in paths.items()}  # before minutes are spent on the others
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
            "RAPL, of the processor" if read_joules else f"{flags.watts:g} W, as --watts says" if flags.watts else None
        )
    document: Json = {"rows": rows, "price": flags.price, "even": even_tokens(rows), "large": planned_rows()}
    large = document["large"]["rows"]
    document["even_large"] = 1e6 * large[0]["hours"][1] / large[2]["hours"][1]
    words = describe(document)
    print_life(words)
    if flags.out:
        from bench.life.page import write_page

        print(f"the page: {write_page(flags.out, document, words)}", file=sys.stderr)
    return document


def even_tokens(rows: list[Json]) -> float:
    """Returns the tokens of answers after which serving has taken as long, and so cost as much, as training."""
    training, _, serving = rows
    return training["seconds"] / serving["seconds"] * serving["tokens"]


def cells(row: Json) -> list[str]:
    """Returns a stage's name and four columns in words."""
    if row["stage"] == "serving":
        weights = {None: "not in the log", 0: "none of them changed", 1: "CHANGED"}[row["moved"]]
        read, written = row["prompt_tokens"], row["tokens"]
        data = f"{quantity(row['requests'], 'request')}: {read:,} tokens read, {written:,} written"
    else:
        weights = f"{row['moved']} of {row['leaves']} changed" + f", and {row['pairs']} pairs beside them" * bool(row["pairs"])
        data = f"{in_words(row['tokens'])} tokens of {row['data']}"
    before, after = (digest[:8] if digest else "?" for digest in (row["before"], row["after"]))
    served = " as served" * (row["stage"] == "serving")
    cost = f"{money(row['usd'])}, {si(row['joules'], 'J') if row['joules'] else ABSENT + ' J'}"
    return [row["stage"], f"{weights}; SHA-256 {before} → {after}{served}", data, cost, duration(row["seconds"])]


def planned_cells(row: Json, params: float) -> list[str]:
    """Returns the same of a planned stage."""
    low, middle, high = row["hours"]
    trained, tokens = row["trained"], f"{in_words(row['tokens'])} tokens"
    beside = f"none, and {in_words(trained)} beside them" if trained < params else f"all {in_words(params)}"
    spread = f"({in_words(low)} to {in_words(high)})"
    return [
        row["stage"], beside if trained else "none", tokens if trained else f"{tokens} of answers",
        f"{money(row['money'][1])}, {in_words(row['energy'][1])} kWh", f"{in_words(middle)} device-hours {spread}",
    ]  # fmt: skip


def describe(document: Json) -> Json:
    """Returns both tables, a row as (share of the weights that changed, whether some were added, cells), and the sentences."""
    large = document["large"]
    planned, even = large["rows"], document["even_large"]
    by = {row["joules_by"] for row in document["rows"]} - {None}
    changed = lambda row: (row["moved"] or 0) / row.get("leaves", 1)
    return {
        "here": [(changed(row), row.get("pairs", 0), cells(row)) for row in document["rows"]],
        "energy": f"Energy: {' and '.join(sorted(by)) or 'not readable here (RAPL); --watts N says what the machine draws'}.",
        "large_title": f"{large['model']} on {large['hardware'].upper()}s, planned",
        "large": [
            (row["trained"] >= large["params"], 0 < row["trained"] < large["params"], planned_cells(row, large["params"]))
            for row in planned
        ],
        "published": f"Published: {large['published_hours']:,.0f} device-hours of training ({large['source']}).",
        "sentence": (
            f"Inference has cost as much as training after {in_words(document['even'])} tokens of answers here, and for "
            f"{large['model']} after {in_words(even)}, {even / planned[0]['tokens']:.2g} for each token of its training. "
            "From there on most of the cost of a model is that of its answers."
        ),
    }  # fmt: skip


def print_life(words: Json) -> None:
    """Prints both tables, where the energy is from, and when inference has cost as much as training."""
    for title, rows, note in (("Measured here", "here", "energy"), (words["large_title"], "large", "published")):
        print(f"{title}\n")
        for *_, (stage, *columns) in words[rows]:
            print(stage, *(f"  {name:<8} {text}" for name, text in zip(HEADS, columns)), "", sep="\n")
        print(f"{words[note]}\n")
    print(words["sentence"])


if __name__ == "__main__":
    sys.exit(run_bench("bench.life", __doc__, LifeFlags, measure_life))
