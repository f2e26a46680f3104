"""Reads what happened in each stage of a model's life: from a run folder, or from the log of a server."""

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from bench.cli import Json
from engine.errors import UserError
from engine.inference.decode import prepare_params
from engine.model.paths import leaf_paths, unflatten
from engine.model.transformer import init_params
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import LoRA, merge_lora
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel, load_model, locate
from engine.storage.run_folder import read_config, read_json


def training_row(run: Path) -> Json:
    """Returns a training run's row: its random weights, made again from their seed, beside those it ended with."""
    record = _finished(run)
    if record["stage"] != "train":
        raise UserError(f"{run} is a run of {record['stage']}, not of train: give it as --tuned.")
    start = jax.jit(lambda: init_params(read_config(run), jax.random.key(record["seed"])))()
    return _row("training", record, start, load_model(str(run)).params)


def tuning_row(run: Path) -> Json:
    """Returns a fine-tuning run's row. Raises UserError when its base is gone, or is not the one it was trained from."""
    record = _finished(run)
    if "base" not in record:
        raise UserError(f"{run} is a run of {record['stage']}, from random weights: give it as --trained.")
    has_pairs = locate(str(run)).format == "adapter"
    name = record["base"]["model"]
    base = load_model(name, dtype=None if has_pairs else "float32").params
    if (found := digest(base)) != record["base"]["digest"]:
        raise UserError(f"{run} was trained from other weights than {name} holds now: its SHA-256 is {found[:16]}.")
    return _row("fine-tuning", record, base, load_model(str(run)).params)


def check_one_life(paths: Mapping[str, Path], rows: Mapping[str, Json]) -> None:
    """Raises UserError unless the tuned run began with the weights that the trained one ended with, and one of them was served.

    `paths` and `rows` are those of `trained`, `tuned` and `log` that are there.
    """
    training, tuning, serving = (rows.get(name) for name in ("trained", "tuned", "log"))
    if training and tuning and tuning["before"] != training["after"]:
        raise UserError(
            f"{paths['tuned']} was not tuned from {paths['trained']}: it began with the SHA-256 {tuning['before'][:16]}, "
            f"and that run ended with {training['after'][:16]}. Give the run it was tuned from as --trained."
        )
    runs = [path for name, path in paths.items() if name != "log"]
    if serving and not any(serving["before"] in _served_digests(load_model(str(run)), serving["weights"]) for run in runs):
        raise UserError(
            f"{paths['log']} is of a server of another model: its weights had SHA-256 {serving['before']}, which neither "
            f"{' nor '.join(map(str, runs))} has in {serving['weights']}. Give the log of a server of --trained or --tuned."
        )


def _served_digests(model: LoadedModel, weights: str) -> Iterator[str]:
    """Yields 16 digits of the SHA-256 of the weights as stages.serve prepares them: on this machine, and without its layout."""
    params, cfg = model.params, model.cfg
    if weights == "int8":
        params = quantize(merge_lora(params, cfg.dtype))
    else:
        cfg = dataclasses.replace(cfg, dtype=weights)  # type: ignore[arg-type]
    for whole in (True, False):
        yield digest(prepare_params(cfg, params, whole))[:16]


def _finished(run: Path) -> Json:
    record = read_json(run / "run.json") if (run / "run.json").exists() else {}
    if "tokens_per_second" not in record.get("result", {}):
        raise UserError(f"{run} is no finished run of train or finetune: its run.json has no result with tokens a second.")
    return record


def _row(stage: str, record: Json, before: Any, after: Any) -> Json:
    old, new = leaf_paths(before), leaf_paths(after)
    own = {path: leaf.base if isinstance(leaf, LoRA) else leaf for path, leaf in new.items()}
    moved = [path for path, leaf in own.items() if digest({"": leaf}) != digest({"": old[path]})]
    pairs, result = sum(isinstance(leaf, LoRA) for leaf in new.values()), record["result"]
    return {
        "stage": stage, "command": record["command"], "seconds": result["train_seconds"], "leaves": len(old),
        "moved": len(moved), "pairs": pairs, "before": digest(before), "after": digest(unflatten(own)),
        "tokens": result["tokens_per_second"] * result["train_seconds"], "data": record["text"]["data"],
    }  # fmt: skip


def serving_row(log: Path) -> Json:
    """Returns the row of a server that ran with --log json, from what it printed on stdout and stderr, and has stopped.

    Seconds are those in which at least one request was under way. Raises UserError for a log without answers.
    """
    spans, tokens, prompts = [], 0, 0
    text = log.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        if '"completion_tokens"' in line:
            try:
                entry = json.loads(line)
                if entry["status"] == 200:
                    begin = datetime.datetime.fromisoformat(entry["time"]).timestamp()
                    spans.append((begin, begin + entry["seconds"]))
                    tokens, prompts = tokens + entry["completion_tokens"], prompts + entry["prompt_tokens"]
            except (ValueError, KeyError, TypeError):  # a line cut off, or not the server's
                continue
    if not tokens:
        raise UserError(f"{log} holds no answered request: keep what stages.serve --log json prints.")
    busy, end = 0.0, 0.0
    for begin, until in sorted(spans):
        busy += max(0.0, until - max(begin, end))
        end = max(end, until)
    first, last = (
        re.search(r"weights +(\w+),.*?SHA-256 (\w{16})", text),
        re.search(r"Stopped\. Weights (\w+).*?SHA-256 (\w{16})", text),
    )
    if not first:
        raise UserError(f"{log} does not say which weights were served: keep all that stages.serve prints, from its start.")
    return {
        "stage": "serving", "command": f"--log {log}", "seconds": busy, "requests": len(spans), "tokens": tokens,
        "prompt_tokens": prompts, "weights": first[1], "before": first[2], "after": last and last[2],
        "moved": None if last is None else 0 if last[1] == "unchanged" else 1,
    }  # fmt: skip
