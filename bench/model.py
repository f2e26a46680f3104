"""Measures a model on this machine: how fast it reads and writes, what memory it takes, and what tuning it would take.

    python -m bench.model --model smollm2-135m-instruct      a minute
    python -m bench.model --model ORG/NAME:Q4_K_M --no-tuning

The weights are those that `stages.serve` has by default. Prompts are random tokens, written on
greedily and without draft tokens, so that the times are the model's and no text's. What tuning it
would take is what `stages.finetune --dry-run` says.
"""

import dataclasses
import functools
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from bench.cli import run_bench, run_module
from bench.machine import Json
from bench.terminal import print_table, progress
from engine.device import start_jax
from engine.errors import UserError
from engine.format import duration, format_bytes

if TYPE_CHECKING:
    from engine.model.config import ModelConfig

NEW = 32  # tokens that each stream writes while it is timed
TUNING_ROWS = ("trainable", "memory", "step", "length")  # of what a dry run prints


class Load(NamedTuple):
    """Streams at once, the tokens of the prompt of each, and whether the time is that of reading it."""

    name: str
    streams: int
    prompt: int
    reads: bool


class LoadRow(NamedTuple):
    """What a load came to, by the median of its rounds."""

    name: str
    tokens_a_second: float
    seconds: float
    round_seconds: tuple[float, ...]


LOADS = (
    Load("reading a prompt of 512", 1, 512, reads=True),
    Load("writing, one stream", 1, 64, reads=False),
    Load("writing, eight streams", 8, 64, reads=False),
)


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """The model, and how often its streams are timed."""

    model: str = "smollm2-135m-instruct"
    """A run or step folder, a Hugging Face folder, a .gguf file, ORG/NAME on the hub, or a named model."""
    rounds: int = 5
    """Times that each load is timed, in turns."""
    data: Annotated[str, tyro.conf.arg(metavar="DATA")] = "voice"
    """What it would be tuned on, as of `stages.finetune`."""
    no_tuning: bool = False
    """Leave out what tuning it would take."""


def measure_model(flags: ModelFlags) -> Json:
    """Times the loads, prints all as a table, and returns a document with it.

    Raises UserError for what is no model, and for one whose context has no room for the loads.
    """
    import jax

    from engine.counting.hardware import peak_rss_bytes
    from engine.inference.config import EngineConfig, default_weights
    from engine.model.weights.convert import describe_weights
    from engine.storage.model_loader import load_model

    start_jax()
    config = EngineConfig(weights=default_weights(jax.default_backend()))
    loaded = load_model(flags.model, keep_kinds=config.kept_kinds)
    cfg = config.model_config(loaded.cfg)
    weights = config.prepare_params(cfg, loaded.params)
    rows = _time_loads(loaded.name, cfg, weights, flags.rounds)
    document: Json = {
        "model": loaded.name,
        "weights": describe_weights(weights),
        "rows": [row._asdict() for row in rows],
        "cache_bytes_a_token": config.slot_bytes(cfg, cfg.context) / cfg.context,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    lines = [(row.name, f"{row.tokens_a_second:,.0f} tokens/s", duration(row.seconds)) for row in rows]
    lines += [
        ("weights", document["weights"], ""),
        ("KV cache, 1,000 tokens", format_bytes(1000 * document["cache_bytes_a_token"]), ""),
        ("memory of this process", format_bytes(document["peak_rss_bytes"]), "at most"),
    ]
    print_table(loaded.name, ("", "", ""), lines)
    if not flags.no_tuning:
        document["tuning"] = _dry_run(flags.model, flags.data)
        print_table(f"to tune it on {flags.data}", ("", ""), [*document["tuning"].items()], left=2)
    return document


def _time_loads(name: str, cfg: "ModelConfig", weights: Any, rounds: int) -> list[LoadRow]:
    """Times the loads in turns. Raises UserError for one that does not fit into the model's context."""
    from bench.peers.serving import ROOM, stream_call
    from bench.timing import describe_noise, measure

    loads = {load.name: load for load in LOADS}
    calls = {}
    decoded: dict[str, int] = {}  # tokens, in the last round
    for load in LOADS:
        room = min(ROOM, cfg.context - load.prompt)
        # The first of eight streams writes on while the last prompt is read.
        if room < NEW * load.streams:
            raise UserError(f"{name} has a context of {cfg.context:,} tokens: {load.name} does not fit.")
        progress(f"compiling: {load.name}")
        calls[load.name] = stream_call(cfg, weights, _prompts(load, cfg.vocab), NEW, room)

    def seconds_of(name: str) -> float:
        result = calls[name]()
        decoded[name] = result["decoded"]
        if loads[name].reads:
            return result["prefill"]
        return result["decode"]

    timings = measure(
        {name: functools.partial(seconds_of, name) for name in calls}, rounds=rounds, seconds_of=float
    )
    print(describe_noise(timings))
    rows = []
    for load in LOADS:
        tokens = load.prompt
        if not load.reads:
            tokens = decoded[load.name]
        seconds = timings[load.name].median
        rows.append(LoadRow(load.name, tokens / seconds, seconds, timings[load.name].seconds))
    return rows


def _prompts(load: Load, vocab: int) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(vocab, size=(load.streams, load.prompt)).tolist()


def _dry_run(model: str, data: str) -> dict[str, str]:
    """Returns TUNING_ROWS of what a dry run of fine-tuning says. Raises UserError with its reason."""
    progress("asking: python -m stages.finetune --dry-run")
    output = run_module(
        ["stages.finetune", "--model", model, "--data", data, "--general", "none", "--dry-run"]
    )
    rows = {}
    for line in output.splitlines():
        match = re.match(rf"({'|'.join(TUNING_ROWS)}) +(.+)", line)
        if match:
            rows[match[1]] = match[2]
    return rows


if __name__ == "__main__":
    sys.exit(run_bench("bench.model", __doc__, ModelFlags, measure_model))
