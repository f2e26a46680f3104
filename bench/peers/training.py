"""Times our training step beside PyTorch's, compiled and eager, on the same weights and data."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.cli import Shape
from bench.machine import Json, bar
from bench.models import PROGRESS, make_step, make_step_inputs
from bench.peers.process import Peer, PeerError, print_absent
from bench.terminal import progress
from bench.timing import describe_noise, held_to, measure, ratio
from engine.counting.flops import train_flops
from engine.errors import UserError
from engine.model.paths import leaf_paths
from engine.processor import cores
from engine.training.optimizer import OptimizerConfig, make_schedule

OURS = "ours"
OVER_TORCH = {"bfloat16": bar(None, 1.15, 1.3), "float32": bar(1.0, 1.0, 1.0)}


def measure_training(
    shape: Shape, dtype: Literal["bfloat16", "float32"], rounds: int, peer: Peer, folder: Path
) -> list[Json]:
    """Prints and returns a row each for torch compiled and eager, `same` if its loss is ours; says
    why one cannot run.

    `ratio` is our speed over the peer's. `folder`: for files that the peer reads. Raises UserError
    when the peer ends.
    """
    inputs = make_step_inputs(shape, dtype)
    file = folder / "training.npz"
    weights: dict[str, Any] = {
        f"params/{path}": np.asarray(leaf) for path, leaf in leaf_paths(inputs.params).items()
    }
    np.savez(file, **weights, tokens=inputs.batch.tokens, targets=inputs.batch.targets)
    optimizer = OptimizerConfig()
    spec = {
        "config": inputs.cfg.to_json(),
        "file": str(file),
        "dtype": dtype,
        "threads": cores(),
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "learning_rate": optimizer.learning_rate * float(make_schedule(optimizer)(jnp.float32(PROGRESS))),
        **{name: getattr(optimizer, name) for name in ("beta1", "beta2", "weight_decay", "clip")},
    }
    losses: dict[str, float] = {}
    step = make_step(inputs, optimizer)

    def run_ours() -> None:
        losses[OURS] = float(step())

    def run_peer(name: str) -> None:
        losses[name] = peer.ask(run=name)["loss"]

    def report(done: int, total: int) -> None:
        progress(f"training, {dtype}: round {done} of {total}")

    calls: dict[str, Callable[[], Any]] = {OURS: run_ours}
    run_ours()
    for name, compiled in (("torch compiled", True), ("torch eager", False)):
        progress(f"preparing {name}, {dtype}")
        try:
            peer.ask(make=name, spec=spec | {"compile": compiled})
            run_peer(name)  # compiles
            calls[name] = functools.partial(run_peer, name)
        except PeerError as error:
            if peer.process.poll() is not None:
                raise UserError(f"{name}, {dtype}: {error}") from None
            print_absent(
                f"{name}, {dtype}", str(error), "a C++ compiler, such as g++, which torch.compile calls"
            )
    peers = [name for name in calls if name != OURS]
    if not peers:  # each was said to be absent
        return []
    timings = measure(calls, rounds=rounds, report=report)
    rounds = len(timings[OURS].seconds)  # fewer, past the deadline of --seconds
    ours = timings[OURS].median
    tokens = shape.batch * shape.tokens
    rows = []
    flops = train_flops(inputs.cfg, shape.tokens, attention="full").total * tokens
    # Compiled or eager: for some shapes and types compiling makes it slower.
    least = OVER_TORCH[dtype]
    for name in peers:
        theirs = timings[name].median
        over = ratio(timings[name], timings[OURS])
        same = bool(np.isclose(losses[OURS], losses[name], rtol=0.01))
        rows.append(
            {
                "name": f"train_{shape}_{dtype}",
                "peer": name,
                "ours_seconds": ours,
                "peer_seconds": theirs,
                "tokens_per_second": tokens / ours,
                "peer_tokens_per_second": tokens / theirs,
                **over._asdict(),
                "bar": least,
                "met": None if least is None else over.exceeds(least),
                "gflops": flops / ours / 1e9,
                "peer_gflops": flops / theirs / 1e9,
                "loss": losses[OURS],
                "peer_loss": losses[name],
                "same": same,
            }
        )
        note = f"loss at step {rounds + 2}: {losses[OURS]:.4f} and {losses[name]:.4f}"
        speeds = f"{tokens / ours:.0f} tokens/s, {name} {tokens / theirs:.0f}; {held_to(over, least)}"
        warning = "" if same else "** not the same computation ** "
        print(f"{rows[-1]['name']} {speeds}; {warning}{note}", flush=True)
        peer.ask(drop=name)
    print(describe_noise(timings), flush=True)
    return rows
