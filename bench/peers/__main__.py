"""Beside what people would use instead, in one run: PyTorch for training, Hugging Face transformers for inference.

    python -m bench.peers                                   both, with the peers of this Python (the extra `peers`)
    python -m bench.peers --peer-python peers/bin/python    peers that live in an environment of their own
    python -m bench.peers --quick                           small shapes, one or two minutes

A peer is another process that computes the same thing from the same weights; it is asked for one round, then we run
one, so that what else this machine does hits both alike. Each has all cores while the other waits. A ratio is our time
over the peer's: below 1, Thrice takes less. The last line is JSON.
"""

import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from bench import cli
from bench.peers.process import Peer, PeerError, note_absent, started
from engine.device import cores, device_name, start_jax
from engine.errors import UserError

Dtype = Literal["bfloat16", "float32"]
Absent = list[dict[str, str]]
OURS = "ours"
SHORT = 64  # tokens of a prompt where decoding is measured


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured."""

    peer_python: Path | None = None
    """The Python that has the peers, when it is not this one."""
    only: Literal["all", "training", "inference"] = "all"
    shape: str = "6x384x256x16"
    """Of training: LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    preset: str = "smollm2-135m"
    """Of inference: the architecture, with random weights."""
    prompt: int = 256
    """Tokens of a prompt in the prefill rows; the decode rows have 64."""
    new: int = 33
    """Tokens to generate in the decode rows."""
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    rounds: int = 5
    """Interleaved rounds, at least 3; the median counts."""
    quick: bool = False
    """Small shapes and bfloat16 alone, unless another value is given."""


QUICK: dict[str, Any] = {"shape": "2x128x64x8", "preset": "demo", "prompt": 64, "new": 17, "dtypes": ("bfloat16",), "rounds": 3}


def measured(flags: Flags) -> dict[str, Any]:
    """All rows, printed as they come, as one JSON document."""
    if flags.quick:
        plain = Flags()
        changed = {name: value for name, value in QUICK.items() if getattr(flags, name) == getattr(plain, name)}
        flags = dataclasses.replace(flags, **changed)
    check(flags)
    start_jax()

    print(f"{device_name()}, {cores()} cores, {flags.rounds} interleaved rounds; a ratio is our time over the peer's")
    if (load := os.getloadavg()[0]) > cores() / 4:
        # OpenMP's threads meet after every operation, and one that was put aside holds up both: the same training row
        # read 0.4 at a load of 9 and 1.1 in a quiet moment.
        print(f"others are at work on this machine (load {load:.1f}): that costs PyTorch more than us and flatters the ratios")
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as place:
        if flags.only != "inference":
            with started(flags.peer_python, "torch_peer.py", absent) as peer:
                if peer:
                    for dtype in flags.dtypes:
                        training(flags, dtype, peer, Path(place), rows, absent)
        if flags.only != "training":
            with started(flags.peer_python, "transformers_peer.py", absent) as peer:
                if peer:
                    inference(flags, peer, Path(place), rows, absent)
    return {"device": device_name(), "cores": cores(), "rounds": flags.rounds, "rows": rows, "absent": absent}


def check(flags: Flags) -> None:
    """Raises UserError for values that cannot be measured."""
    from bench.steps import shape
    from engine.counting.hardware import memory_limit_bytes
    from engine.counting.params import count_params
    from engine.model.config import preset

    if shape(flags.shape) is None:
        raise UserError(f"--shape is LAYERSxWIDTHxTOKENSxBATCH with a width in 64s, such as 6x384x256x16, not {flags.shape!r}.")
    for name, least in (("rounds", 3), ("prompt", 1), ("new", 2)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(flags, name)}.")
    if not flags.dtypes:
        raise UserError("--dtypes needs bfloat16, float32 or both.")
    cfg = preset(flags.preset)
    longest = max(flags.prompt + 1, SHORT + flags.new)
    if longest > cfg.context:
        raise UserError(f"{longest} tokens do not fit {flags.preset}'s context of {cfg.context}; give fewer --prompt or --new.")
    # Ours in float32 and as computed, the peer's as loaded and as computed.
    needed, limit = 16 * count_params(cfg).total, memory_limit_bytes()
    if needed > limit and flags.only != "training":
        raise UserError(
            f"--preset {flags.preset} twice in memory needs about {needed / 1e9:.0f} GB, and there are {limit / 1e9:.0f}; "
            "give a smaller one, such as smollm2-135m."
        )


def training(flags: Flags, dtype: Dtype, peer: Peer, place: Path, rows: list[dict[str, Any]], absent: Absent) -> None:
    """Our step beside torch's, compiled and eager: weights, text and optimizer are the same, and so must be the losses."""
    import jax.numpy as jnp
    import numpy as np

    from bench import steps
    from bench.timing import measure, noise
    from engine.counting.flops import step_flops
    from engine.model.paths import leaf_paths
    from engine.training.optimizer import OptimizerConfig, make_schedule

    given = steps.shape(flags.shape)
    assert given is not None
    work = steps.work(given, dtype)
    file = place / "training.npz"
    save(file, leaf_paths(work.params), tokens=work.batch.tokens, targets=work.batch.targets)
    optimizer, progress = OptimizerConfig(), 0.5
    settings = {
        "config": work.cfg.to_json(), "file": str(file), "dtype": dtype, "threads": cores(),
        "learning_rate": optimizer.learning_rate * float(make_schedule(optimizer)(jnp.float32(progress))),
        "beta1": optimizer.beta1, "beta2": optimizer.beta2, "weight_decay": optimizer.weight_decay, "clip": optimizer.clip,
    }  # fmt: skip
    losses: dict[str, float] = {}
    step = steps.stepper(work, progress=progress)
    runs: dict[str, Callable[[], Any]] = {OURS: lambda: losses.update({OURS: float(step())})}
    runs[OURS]()
    for name, compiled in (("torch compiled", True), ("torch eager", False)):
        tell(f"preparing {name}, {dtype}")
        keep = functools.partial(lambda name, reply: losses.update({name: reply["loss"]}), name)
        try:
            runs[name] = peer.prepare(name, settings | {"compile": compiled}, keep)
        except PeerError as error:
            if peer.gone:
                raise UserError(f"{name}, {dtype}: {error}") from None
            note_absent(absent, f"{name}, {dtype}", str(error), "a C++ compiler, such as g++, which torch.compile calls")
    timings = measure(runs, rounds=flags.rounds, report=rounds_of(f"training, {dtype}"))
    flops = step_flops(work.cfg, given.batch, given.tokens)
    for name in list(runs)[1:]:
        row = compared(f"train_{given}_{dtype}", name, timings, given.batch * given.tokens)
        row |= {"gflops": flops / row["ours_seconds"] / 1e9, "peer_gflops": flops / row["peer_seconds"] / 1e9}
        row |= {"loss": losses[OURS], "peer_loss": losses[name]}
        same = bool(np.isclose(losses[OURS], losses[name], rtol=0.01))
        said = f"loss at step {flags.rounds + 2}: {losses[OURS]:.4f} and {losses[name]:.4f}"
        show(rows, row | {"same": same}, said if same else f"** not the same computation ** {said}")
        peer.ask(drop=name)
    print(noise(timings), flush=True)


def inference(flags: Flags, peer: Peer, place: Path, rows: list[dict[str, Any]], absent: Absent) -> None:
    """Our `generate` beside transformers', greedy, on the same weights and prompts, alone and eight at a time.

    A prefill row reads --prompt tokens and says one; a decode row reads SHORT tokens and says --new. Seconds are of the
    whole call, and tokens a second count what is read, or said.
    """
    import numpy as np

    from bench.timing import measure, noise
    from engine.inference.decode import for_inference
    from engine.model.config import preset
    from engine.model.paths import leaf_paths

    cfg = preset(flags.preset)
    params = random_params(cfg)
    prompts = np.random.default_rng(1).integers(0, cfg.vocab, (8, max(flags.prompt, SHORT)), np.int32)
    file = place / "inference.npz"
    save(file, leaf_paths(params), tokens=prompts)
    for dtype in flags.dtypes:
        how = dataclasses.replace(cfg, dtype=dtype)
        weights = for_inference(how, params)
        everything: dict[str, Any] = {}
        for name, batch, prompt, new in (
            ("prefill_1", 1, flags.prompt, 1), ("prefill_8", 8, flags.prompt, 1),
            ("decode_1", 1, SHORT, flags.new), ("decode_8", 8, SHORT, flags.new),
        ):  # fmt: skip
            tell(f"preparing {name}, {dtype}")
            settings = {
                "config": how.to_json(), "file": str(file), "dtype": dtype, "threads": cores(), "rows": batch,
                "prompt": prompt, "new": new,
            }  # fmt: skip
            said: dict[str, Any] = {}
            ours = greedy(how, weights, prompts[:batch, :prompt].tolist(), new, said)
            try:
                theirs = peer.prepare("generate", settings, said.update)
            except PeerError as error:
                if peer.gone:
                    raise UserError(f"transformers, {dtype}: {error}") from None
                note_absent(absent, f"transformers, {dtype}", str(error), "see the reason")
                break
            runs = {OURS: ours, "transformers": theirs}
            timings = measure(runs, rounds=flags.rounds, report=rounds_of(f"{name}, {dtype}"))
            everything |= {f"{name} {who}": timing for who, timing in timings.items()}
            row = compared(f"{name}_{dtype}", "transformers", timings, batch * (prompt if new == 1 else new))
            same = float(np.mean(np.array(said[OURS]) == np.array(said["tokens"])))
            show(rows, row | {"preset": flags.preset, "same_tokens": same}, f"{same:.0%} of the tokens are the same")
            peer.ask(drop="generate")
        if everything:
            print(noise(everything), flush=True)


def random_params(cfg: Any) -> Any:
    """Weights in float32. As drawn for training a block adds nothing; here every matrix has a say in every token."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from engine.model.paths import map_paths
    from engine.model.transformer import init_params

    draw = np.random.default_rng(0)

    def drawn(path: str, leaf: Any) -> Any:
        if path.endswith("norm"):
            return jnp.ones(leaf.shape)
        std = 0.05 if path == "embed" or leaf.ndim < 2 else leaf.shape[0] ** -0.5
        return jnp.asarray(std * draw.standard_normal(leaf.shape, np.float32))

    return map_paths(drawn, jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0)))


def greedy(cfg: Any, weights: Any, prompts: list[list[int]], new: int, said: dict[str, Any]) -> Callable[[], None]:
    """A callable that continues each prompt by `new` tokens and leaves them in `said`."""
    from engine.inference.decode import generate
    from engine.inference.sampling_params import SamplingParams

    sampling = SamplingParams(max_tokens=new, temperature=0.0).per_row(len(prompts))

    def run() -> None:
        texts: list[list[int]] = [[] for _ in prompts]
        for piece in generate(cfg, weights, prompts, sampling, capacity=len(prompts[0]) + new):
            texts[piece.prompt] += piece.tokens
        said[OURS] = texts

    return run


def save(file: Path, leaves: dict[str, Any], **arrays: Any) -> None:
    """Weights in float32 under `params/PATH`, and what else the peer reads, as one .npz."""
    import numpy as np

    weights: dict[str, Any] = {f"params/{path}": np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
    np.savez(file, **weights, **arrays)


def compared(name: str, peer: str, timings: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The row of one comparison; `ratio` is None, with `noisy` telling why, when the rounds do not carry one."""
    from bench.timing import TooNoisyError, ratio

    ours, theirs = timings[OURS], timings[peer]
    row: dict[str, Any] = {
        "name": name, "peer": peer, "ours_seconds": ours.median, "peer_seconds": theirs.median, "ratio": None,
        "best_ratio": ours.best / theirs.best,
        "tokens_per_second": tokens / ours.median, "peer_tokens_per_second": tokens / theirs.median,
    }  # fmt: skip
    try:
        found = ratio(ours, theirs)
    except TooNoisyError as error:
        return row | {"noisy": str(error)}
    return row | {"ratio": found.value, "spread": found.spread}


def show(rows: list[dict[str, Any]], row: dict[str, Any], note: str) -> None:
    """Keeps a row and prints it."""
    rows.append(row)
    ratio = f"{row['ratio']:5.2f} ± {row['spread']:.2f}" if row["ratio"] else "lost in noise"
    ours, theirs = row["tokens_per_second"], row["peer_tokens_per_second"]
    print(f"{row['name']:<27} {ours:7.0f} tokens/s, {row['peer']:<14} {theirs:7.0f}; ratio {ratio:<13} {note}", flush=True)


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def rounds_of(what: str) -> Callable[[int, int], None]:
    """A `report` that says which round is done."""
    return lambda done, total: tell(f"{what}: round {done} of {total}")


def main(args: list[str] | None = None) -> int:
    """Measures, prints the table and, last, one line of JSON."""
    return cli.run("bench.peers", __doc__, Flags, measured, args)


if __name__ == "__main__":
    sys.exit(main())
