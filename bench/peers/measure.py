"""Times our training step beside PyTorch's, and our `generate` beside transformers' or vLLM's, on the same weights and data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.cli import Json, Shape, progress
from bench.models import PROGRESS, make_step, make_step_inputs, random_model
from bench.peers.process import Peer, PeerError, note_absent
from bench.timing import Ratio, Timing, describe_noise, measure, ratio
from engine.counting.flops import step_flops
from engine.counting.hardware import require_memory
from engine.counting.params import count_params
from engine.device import cores
from engine.errors import UserError
from engine.inference.decode import prepare_params
from engine.inference.engine import complete
from engine.inference.request import SamplingParams
from engine.model.config import ModelConfig, preset
from engine.model.paths import leaf_paths
from engine.storage.huggingface.folder import save_folder
from engine.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

OURS = "ours"
DECODE_PROMPT = 64  # tokens of a prompt in the decode rows


def comparison_row(name: str, peer: str, timings: Mapping[str, Timing], tokens: int) -> Json:
    """Returns the row of one comparison of whole calls: `ratio` is our seconds over the peer's; None where `noisy` says why."""
    ours, theirs = timings[OURS], timings[peer]
    return {
        "name": name, "peer": peer, "ours_seconds": ours.median, "peer_seconds": theirs.median,
        "tokens_per_second": tokens / ours.median, "peer_tokens_per_second": tokens / theirs.median,
    } | ratio(ours, theirs).fields()  # fmt: skip


def add_row(rows: list[Json], row: Json, note: str) -> None:
    """Appends the row, and prints it with the note."""
    rows.append(row)
    ratio = Ratio(row["ratio"], row["low"], row["high"])
    ours, theirs = row["tokens_per_second"], row["peer_tokens_per_second"]
    print(f"{row['name']:<27} {ours:7.0f} tokens/s, {row['peer']:<14} {theirs:7.0f}; ratio {ratio!s:<13} {note}", flush=True)


def measure_training(
    shape: Shape, dtype: Literal["bfloat16", "float32"], rounds: int, peer: Peer, folder: Path, rows: list[Json],
    absent: list[dict[str, str]],
) -> None:  # fmt: skip
    """Adds a row each for torch compiled and eager, `same` if its loss is ours; notes in `absent` why one cannot run.

    `folder`: for files that the peer reads.
    """
    inputs = make_step_inputs(shape, dtype)
    file = folder / "training.npz"
    weights: dict[str, Any] = {f"params/{path}": np.asarray(leaf) for path, leaf in leaf_paths(inputs.params).items()}
    np.savez(file, **weights, tokens=inputs.batch.tokens, targets=inputs.batch.targets)
    optimizer = OptimizerConfig()
    spec = {
        "config": inputs.cfg.to_json(), "file": str(file), "dtype": dtype, "threads": cores(),
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "learning_rate": optimizer.learning_rate * float(make_schedule(optimizer)(jnp.float32(PROGRESS))),
        "beta1": optimizer.beta1, "beta2": optimizer.beta2, "weight_decay": optimizer.weight_decay, "clip": optimizer.clip,
    }  # fmt: skip
    losses: dict[str, float] = {}
    step = make_step(inputs, make_optimizer(optimizer))
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: losses.update({OURS: float(step())})}
    calls[OURS]()
    for name, compiled in (("torch compiled", True), ("torch eager", False)):
        progress(f"preparing {name}, {dtype}")
        keep = functools.partial(lambda name, reply: losses.update({name: reply["loss"]}), name)
        try:
            calls[name] = peer.prepare(name, spec | {"compile": compiled}, keep)
        except PeerError as error:
            if peer.has_ended:
                raise UserError(f"{name}, {dtype}: {error}") from None
            note_absent(absent, f"{name}, {dtype}", str(error), "a C++ compiler, such as g++, which torch.compile calls")
    report = lambda done, total: progress(f"training, {dtype}: round {done} of {total}")
    timings = measure(calls, rounds=rounds, report=report)
    flops = step_flops(inputs.cfg, shape.batch, shape.tokens)
    for name in list(calls)[1:]:
        row = comparison_row(f"train_{shape}_{dtype}", name, timings, shape.batch * shape.tokens)
        row |= {"gflops": flops / row["ours_seconds"] / 1e9, "peer_gflops": flops / row["peer_seconds"] / 1e9}
        row |= {"loss": losses[OURS], "peer_loss": losses[name]}
        same = bool(np.isclose(losses[OURS], losses[name], rtol=0.01))
        note = f"loss at step {rounds + 2}: {losses[OURS]:.4f} and {losses[name]:.4f}"
        add_row(rows, row | {"same": same}, note if same else f"** not the same computation ** {note}")
        peer.ask(drop=name)
    print(describe_noise(timings), flush=True)


def check_preset(preset_name: str, prompt: int, new: int) -> None:
    """Raises UserError when a row's tokens do not fit the preset's context, or two copies do not fit memory."""
    cfg = preset(preset_name)
    longest = max(prompt + 1, DECODE_PROMPT + new)
    if longest > cfg.context:
        raise UserError(f"{longest} tokens do not fit {preset_name}'s context of {cfg.context}; give fewer --prompt or --new.")
    # Ours and the peer's, each as loaded and as computed.
    require_memory(
        16 * count_params(cfg).total, f"--preset {preset_name} twice in memory needs about",
        "give a smaller preset, such as smollm2-135m.",
    )  # fmt: skip


def measure_inference(
    preset_name: str, prompt: int, new: int, dtype: Literal["bfloat16", "float32"], rounds: int, peer: Peer, folder: Path,
    rows: list[Json], absent: list[dict[str, str]], name: str = "transformers",
) -> None:  # fmt: skip
    """Adds prefill and decode rows of a number type, each with the share of `same_tokens`; else notes in `absent` why not.

    A prefill row reads `prompt` tokens and makes one; a decode row reads DECODE_PROMPT tokens and makes `new`. Seconds are the
    whole call's; tokens a second count those read, or those made. `folder`: for files that the peer reads; `name`: the peer's.
    """
    cfg = dataclasses.replace(preset(preset_name), dtype=dtype)
    params = random_model(preset_name, cfg).params
    prompts = np.random.default_rng(1).integers(0, cfg.vocab, (8, max(prompt, DECODE_PROMPT)), np.int32)
    save_folder(folder / "model", cfg, params, {}, dtype="float32")
    weights = prepare_params(cfg, params)
    every: dict[str, Timing] = {}
    for row_name, batch, length, tokens in (
        ("prefill_1", 1, prompt, 1), ("prefill_8", 8, prompt, 1),
        ("decode_1", 1, DECODE_PROMPT, new), ("decode_8", 8, DECODE_PROMPT, new),
    ):  # fmt: skip
        progress(f"preparing {row_name}, {dtype}")
        sequences = prompts[:batch, :length].tolist()
        spec = {"folder": str(folder / "model"), "dtype": dtype, "threads": cores(), "prompts": sequences, "new": tokens}
        output: dict[str, Any] = {}
        ours = make_greedy(cfg, weights, sequences, tokens, output)
        try:
            theirs = peer.prepare("generate", spec, output.update)
        except PeerError as error:
            if peer.has_ended:
                raise UserError(f"{name}, {dtype}: {error}") from None
            note_absent(absent, f"{name}, {dtype}", str(error), "see the reason")
            break
        report = lambda done, total, row=row_name: progress(f"{row}, {dtype}: round {done} of {total}")
        timings = measure({OURS: ours, name: theirs}, rounds=rounds, report=report)
        every |= {f"{row_name} {way}": timing for way, timing in timings.items()}
        row = comparison_row(f"{row_name}_{dtype}", name, timings, batch * (length if tokens == 1 else tokens))
        same = float(np.mean(np.array(output[OURS]) == np.array(output["tokens"])))
        add_row(rows, row | {"preset": preset_name, "same_tokens": same}, f"{same:.0%} of the tokens are the same")
        peer.ask(drop="generate")
    if every:
        print(describe_noise(every), flush=True)


def make_greedy(
    cfg: ModelConfig, weights: Any, prompts: list[list[int]], new: int, output: dict[str, Any]
) -> Callable[[], None]:
    """Returns a call that continues each prompt by `new` tokens and leaves them in `output`."""
    sampling = SamplingParams(max_tokens=new, temperature=0.0).per_row(len(prompts))

    def run() -> None:
        completions = complete(cfg, weights, prompts, sampling, len(prompts[0]) + new)
        output[OURS] = [completion.tokens for completion in completions]

    return run
