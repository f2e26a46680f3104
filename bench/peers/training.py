"""Times our training step beside PyTorch's, compiled and eager, with the same weights, text, optimizer, and so losses."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from bench.cli import Json, Shape, progress
from bench.models import PROGRESS, make_step, make_work
from bench.peers.process import Peer, PeerError, note_absent
from bench.peers.rows import OURS, add_row, comparison
from bench.timing import measure, noise
from engine.counting.flops import step_flops
from engine.device import cores
from engine.errors import UserError
from engine.model.paths import leaf_paths
from engine.training.optimizer import OptimizerConfig, make_optimizer, make_schedule


def measure_training(
    shape: Shape, dtype: Literal["bfloat16", "float32"], rounds: int, peer: Peer, folder: Path, rows: list[Json],
    absent: list[dict[str, str]],
) -> None:  # fmt: skip
    """Adds a row for torch compiled and eager to `rows`, or notes in `absent` why there is none. `folder`: for files that the
    peer reads."""
    work = make_work(shape, dtype)
    file = folder / "training.npz"
    weights: dict[str, Any] = {f"params/{path}": np.asarray(leaf) for path, leaf in leaf_paths(work.params).items()}
    np.savez(file, **weights, tokens=work.batch.tokens, targets=work.batch.targets)
    optimizer = OptimizerConfig()
    spec = {
        "config": work.cfg.to_json(), "file": str(file), "dtype": dtype, "threads": cores(),
        "learning_rate": optimizer.learning_rate * float(make_schedule(optimizer)(jnp.float32(PROGRESS))),
        "beta1": optimizer.beta1, "beta2": optimizer.beta2, "weight_decay": optimizer.weight_decay, "clip": optimizer.clip,
    }  # fmt: skip
    losses: dict[str, float] = {}
    step = make_step(work, make_optimizer(optimizer))
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: losses.update({OURS: float(step())})}
    calls[OURS]()
    for name, compiled in (("torch compiled", True), ("torch eager", False)):
        progress(f"preparing {name}, {dtype}")
        keep = functools.partial(lambda name, reply: losses.update({name: reply["loss"]}), name)
        try:
            calls[name] = peer.prepare(name, spec | {"compile": compiled}, keep)
        except PeerError as error:
            if peer.gone:
                raise UserError(f"{name}, {dtype}: {error}") from None
            note_absent(absent, f"{name}, {dtype}", str(error), "a C++ compiler, such as g++, which torch.compile calls")
    report = lambda done, total: progress(f"training, {dtype}: round {done} of {total}")
    timings = measure(calls, rounds=rounds, report=report)
    flops = step_flops(work.cfg, shape.batch, shape.tokens)
    for name in list(calls)[1:]:
        row = comparison(f"train_{shape}_{dtype}", name, timings, shape.batch * shape.tokens)
        row |= {"gflops": flops / row["ours_seconds"] / 1e9, "peer_gflops": flops / row["peer_seconds"] / 1e9}
        row |= {"loss": losses[OURS], "peer_loss": losses[name]}
        same = bool(np.isclose(losses[OURS], losses[name], rtol=0.01))
        note = f"loss at step {rounds + 2}: {losses[OURS]:.4f} and {losses[name]:.4f}"
        add_row(rows, row | {"same": same}, note if same else f"** not the same computation ** {note}")
        peer.ask(drop=name)
    print(noise(timings), flush=True)
