"""Records a model's lives: runs the stages as processes, asks the trained model, measures a step of each."""

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.cli import run_module
from bench.machine import Json
from bench.models import BenchModel, answer, next_token_batch, tokens_for
from bench.stages.checks import SLOTS
from bench.stages.memory import memory_over_time
from bench.stages.rows import ADAPTER, Row, decode_row, evaluation_row, training_kinds, training_row
from bench.terminal import progress
from bench.timing import MIN_ROUNDS, measure, ratio
from engine.counting.hardware import clock
from engine.errors import UserError
from engine.inference.config import SMALL_CHUNK, EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from engine.model.config import preset
from engine.model.paths import leaf_paths
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel
from engine.storage.run_folder import read_json
from engine.training.optimizer import OptimizerConfig, muon_flops

# of each fine-tuning: with rates of their own, one could not see what each way of it does
RATE = "2e-3"
ASKED = 100
TOKENS = 48
NAMES = (
    "JULIET",
    "HAMLET",
    "MACBETH",
    "KING",
    "QUEEN",
    "FIRST LORD",
    "CLOWN",
    "NURSE",
    "MESSENGER",
    "DUKE",
    "ANTONY",
)
INDEPENDENT = (
    "The king is dead.\n\nROMEO:\n",
    "I love thee, Juliet.\n\nROMEO:\n",
    "The king is well.\n\nROMEO:\n",
)
ROUNDS = 20
# the row of the stage table that computes as a life does, and its passes
ROWS = {
    "train": ("pre-training step", "forward and backward"),
    "frozen": ("bottom half frozen", "forward, and backward to the middle"),
    "lora": (f"LoRA rank {ADAPTER.rank} on q and v", "forward, and backward to the adapters"),
    "all": ("full fine-tuning", "forward and backward"),
}


def record_lives(preset_name: str, data: str, folder: Path, quick: bool) -> dict[str, Json]:
    """Trains a preset on `data`, and fine-tunes the result on the house voice: its bottom half
    frozen, by LoRA, and whole.

    Returns the lives `train`, `frozen`, `lora` and `all`, whose run folders lie in `folder` by
    these names. Raises UserError for a run that fails, or that was not recorded to its end.
    """
    seconds, tune_seconds = ("6s", "2s") if quick else ("60s", "15s")
    tune = ["stages.finetune", "--model", str(folder / "train"), "--data", "voice", "--general", "none"]
    tune += ["--learning-rate", RATE, "--max-time", tune_seconds]
    commands = {
        "train": ["stages.train", preset_name, "--data", data, "--max-time", seconds],
        "frozen": [*tune, "--freeze", f"bottom:{preset(preset_name).layers // 2}"],
        "lora": [*tune, "--lora", str(ADAPTER)],
        "all": [*tune, "--train", "all"],
    }
    lives = {}
    for name, command in commands.items():
        recording = folder / f"{name}.jsonl"
        command = [*command, "--out-dir", str(folder / name)]
        shown = shlex.join(["python", "-m", *command]).replace(f"{folder}/", "runs/")
        progress(shown)
        run_module([*command, "--record", str(recording)], step_reporter(recording))
        lives[name] = read_life(recording) | {"command": shown}
    return lives


def step_reporter(recording: Path) -> Callable[[], None]:
    """Returns a function that prints the step that a run's recording has reached, if it is another
    than at the last call.
    """
    printed = ""

    def report() -> None:
        nonlocal printed
        events = _events(recording)
        if not events:
            return
        line = f"  step {events[-1]['step']:,}"
        if events[-1]["event"] == "measure":
            line += ", the last; its result is measured"
        if line != printed:
            progress(line, replace=True)
        printed = line

    return report


def _events(recording: Path) -> list[Json]:
    """Returns the events so far, without a last line that was cut; none where there is no file."""
    if recording.exists():
        lines = recording.read_text(encoding="utf-8").split("\n")
    else:
        lines = [""]
    return [json.loads(line) for line in lines[:-1]]


def read_life(recording: Path) -> Json:
    """Returns a run's recorded events by kind. Raises UserError when they do not reach from its
    beginning to its end.
    """
    events = _events(recording)

    def of_kind(kind: str) -> list[Json]:
        return [event for event in events if event["event"] == kind]

    begin = of_kind("begin")
    frames = of_kind("frame")
    end = of_kind("end")
    if not (begin and frames and end):
        raise UserError(
            f"{recording} does not hold a run from its beginning to its end: "
            "start the run anew, with --record."
        )
    return {
        "begin": begin[0],
        "steps": of_kind("step"),
        "validation": of_kind("validation"),
        "frames": frames,
        "end": end[-1],
    }


def answer_requests(model: LoadedModel, prompt: str) -> Json:
    """Asks ASKED requests, `prompt` the first of them, and compares all weights before and after:
    by digest and by element.

    The engine computes in float32, so that it holds the weights of the checkpoint, bit for bit. Two
    of the three requests of `independent` are asked side by side; the third is the first with
    another context.
    """
    cfg = dataclasses.replace(model.cfg, dtype="float32")
    tokenizer = model.tokenizer
    most = min(TOKENS, cfg.context // 2)
    config = EngineConfig(SLOTS, cfg.context, kv_dtype="float32", chunk=SMALL_CHUNK, tail=SMALL_CHUNK)
    engine = Engine(cfg, prepare_params(cfg, model.params, whole=False), config)
    before = {path: np.array(leaf) for path, leaf in leaf_paths(engine.params).items()}
    sha = digest(engine.params)
    engine.warm()

    def request(text: str, seed: int) -> Request:
        tokens = tokenizer.encode(text)[most - cfg.context :]
        return Request(tuple(tokens.tolist()), SamplingParams(max_tokens=most, temperature=0.8, seed=seed))

    prompts = [prompt, *(f"{name}:\n" for name in NAMES)]
    requests = [request(prompts[number % len(prompts)], number) for number in range(ASKED)]
    first, second, edited = (request(text, 0) for text in INDEPENDENT)
    begin = clock()
    answers = answer(engine, requests)
    seconds = clock() - begin
    (alone,) = answer(engine, [first])
    timings = measure(
        {
            "alone": functools.partial(answer, engine, [first]),
            "together": functools.partial(answer, engine, requests[:SLOTS]),
        },
        rounds=MIN_ROUNDS,
    )
    token_seconds = {
        "alone": timings["alone"].median / len(alone),
        "together": timings["together"].median / sum(map(len, answers[:SLOTS])),
    }
    independent = answer(engine, [first, second]) + answer(engine, [edited])
    changed = _count_changed(before, engine.params)
    position_bytes = config.slot_bytes(cfg, cfg.context) // engine.config.edges[-1]
    # at last it is dropped
    positions = [*range(len(first.prompt), len(first.prompt) + len(alone)), engine.used_positions]
    return {
        "asked": ASKED,
        "before": sha,
        "after": digest(engine.params),
        "changed": changed,
        "of": sum(leaf.size for leaf in before.values()),
        "seconds": seconds,
        "token_seconds": token_seconds,
        "tokens": sum(map(len, answers)),
        "answers": [
            {"prompt": text, "text": tokenizer.decode(tokens)} for text, tokens in zip(prompts, answers)
        ],
        "independent": [
            {"prompt": text, "text": tokenizer.decode(tokens), "edited": text == INDEPENDENT[2]}
            for text, tokens in zip(INDEPENDENT, independent)
        ],
        "same_alone": alone == independent[0],
        "cache_bytes": [position_bytes * position for position in positions],
    }


def _count_changed(before: dict[str, np.ndarray], params: Any) -> int:
    """Returns how many weights differ in their bits, all of them in float32."""
    changed = 0
    for path, leaf in leaf_paths(params).items():
        differs = np.asarray(leaf).view(np.uint32) != before[path].view(np.uint32)
        changed += int(differs.sum())
    return changed


def measure_costs(model: LoadedModel, folder: Path, quick: bool) -> tuple[list[Json], dict[str, Json]]:
    """Returns the costs of each life and of `answer`, per token, and the memory of one step of each
    over time.

    All steps are of one batch, as the training run's; each has the optimizer of its own run, in
    `folder`. The cost of `answer` is that of the forward pass over the batch, to which all ratios
    are; its memory is that of decoding.
    """
    recipes = {life: read_json(folder / life / "run.json")["recipe"] for life in ROWS}
    cfg = model.cfg
    B = recipes["train"]["batch"]
    T = recipes["train"]["context"]
    batch = next_token_batch(tokens_for(BenchModel(model.name, cfg, model.params, model.tokenizer), B, T + 1))
    kinds = {kind.name: kind for kind in training_kinds(cfg)}
    rows: dict[str, Row] = {}
    passes = {}
    for life, (name, words) in ROWS.items():
        optimizer = OptimizerConfig(**recipes[life]["optimizer"])
        rows[life] = training_row(cfg, model.params, kinds[name], batch, optimizer)
        passes[life] = words
    programs = {life: row.program for life, row in rows.items()}
    served = prepare_params(cfg, model.params)
    programs["answer"] = decode_row(cfg, served, SLOTS, T, name="answer", weights=None).program
    forward = evaluation_row(cfg, served, batch)
    rows["answer"] = forward
    passes["answer"] = "forward"
    if recipes["train"]["optimizer"]["kind"] == "muon":
        passes["train"] += (
            "; the update, called Muon, takes "
            f"{muon_flops(cfg) / forward.formula.total:.1f} forward passes more"
        )
    timings = measure({life: row.run for life, row in rows.items()}, rounds=MIN_ROUNDS if quick else ROUNDS)
    costs = []
    for life, row in rows.items():
        times = ratio(timings[life], timings["answer"])
        flops = row.formula.total
        costs.append(
            {
                "stage": life,
                "passes": passes[life],
                "flops_per_token": flops / row.tokens,
                "counted_ratio": flops / forward.formula.total,
                "seconds_per_token": timings[life].median / row.tokens,
                "time_ratio": times.ratio,
                "time_ratio_interval": [times.low, times.high],
                "round_ratios": times.round_ratios,
                "bytes": row.peak_bytes,
            }
        )
    return costs, {life: memory_over_time(program).document() for life, program in programs.items()}
