"""Checks that requests affect neither each other nor a weight, that devices agree, and what int8 costs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import Json
from bench.models import random_model
from bench.terminal import print_table, progress
from engine.device import device_name
from engine.inference.config import EngineConfig
from engine.inference.decode import prefill, prepare_params
from engine.inference.engine import Engine, complete
from engine.inference.request import Request, SamplingParams
from engine.model.config import ModelConfig, preset
from engine.model.loss import score
from engine.model.transformer import forward, make_cache
from engine.storage.digest import digest
from engine.text.batch import Batch
from engine.training.step import loss_and_gradient

SLOTS = 8  # of the server
NEW = 32  # tokens of each answer
ROWS = 4
TOKENS = 256
# Relative to the largest number of each array. In bfloat16 they are sums of many roundings, in
# another order on each platform.
TOLERANCES: dict[Literal["float32", "bfloat16"], float] = {"float32": 1e-4, "bfloat16": 3e-2}


def model_state(cfg: ModelConfig, params: Any, batch: Batch) -> tuple[str, str]:
    """Returns the mean nats of a batch as hex, which shows every bit, and the digest of the
    weights.
    """
    return (float(score(cfg, params, batch)) / batch.tokens.size).hex(), digest(params)


def serve_beside_others(cfg: ModelConfig, params: Any, capacity: int) -> tuple[int, bool]:
    """Returns in how many of SLOTS slots a request beside others gets other tokens, or other bits
    of log-probabilities, than alone; and whether that changed a weight. The engine is the server's,
    of `params` that are prepared for inference and `capacity` tokens a slot.
    """
    engine = Engine(cfg, params, EngineConfig(SLOTS, capacity, prefix_cache_bytes=10**7))
    prompts = random_prompts(cfg, SLOTS, capacity - NEW)
    others = [
        Request(tuple(each), SamplingParams(max_tokens=NEW, temperature=0.8, seed=5)) for each in prompts[1:]
    ]
    request = Request(tuple(prompts[0]), SamplingParams(max_tokens=NEW, temperature=0.8, seed=9, logprobs=0))

    def answer(slot: int, beside: Sequence[Request]) -> tuple[Any, ...]:
        """Returns the tokens and log-probabilities of the request, submitted at `slot` among the
        requests `beside`.
        """
        ids = [engine.submit(each) for each in (*beside[:slot], request, *beside[slot:])]
        tokens = []
        logprobs = []
        while engine.busy:
            for event in engine.step():
                if event.id == ids[slot]:
                    tokens += event.tokens
                    logprobs += [each.logprob for each in event.logprobs]
        return tokens, logprobs

    before = digest(engine.params)
    alone = answer(0, [])
    changed = sum(answer(slot, others) != alone for slot in range(SLOTS))
    return changed, digest(engine.params) != before


def random_prompts(cfg: ModelConfig, count: int, most: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, cfg.vocab, int(rng.integers(5, most))).tolist() for _ in range(count)]


def logits_error(cfg: ModelConfig, params: Any, other: Any, batch: Batch) -> float:
    """Returns the root mean square of `other`'s logits less those of `params`, as a share of the
    latter's spread.
    """
    run = jax.jit(functools.partial(forward, cfg))
    first, second = (run(weights, batch.tokens[:2], batch.positions[:2])[0] for weights in (params, other))
    return float(jnp.sqrt(jnp.mean((first - second) ** 2)) / jnp.std(first))


class Check(NamedTuple):
    """A comparison: how far two sides are apart, and how far they may be."""

    name: str
    difference: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.limit  # False for NaN too


def measure_checks() -> Json:
    """Runs every check on JAX's device beside the processor, prints the table, and returns the
    document.
    """
    checks = list(all_checks())
    number = "{:.2g}".format
    rows = []
    for check in checks:
        verdict = "" if check.holds else "FAILS"
        rows.append((check.name, number(check.difference), number(check.limit), verdict))
    print_table(f"{device_name()} beside the processor", ("check", "apart", "at most", ""), rows)
    return {"checks": [check._asdict() | {"holds": check.holds} for check in checks]}


def all_checks() -> Iterator[Check]:
    """Yields every check, on JAX's device beside the processor; one that cannot run fails, with the
    reason as its name.

    The two small models together have most of what a model can: q/k norm, shared key heads, heads
    tied and not.
    """
    device = jax.devices()[0]
    cpu = jax.devices("cpu")[0]
    small = dataclasses.replace(preset("smollm2-135m"), layers=2, vocab=4096, context=1024)
    for name, plain in {"nano": preset("nano"), "two layers of smollm2": small}.items():
        params = random_model(name, plain).params
        progress(f"checking {name} beside the processor")
        for dtype in TOLERANCES:
            cfg = dataclasses.replace(plain, dtype=dtype)
            # Greedy tokens in float32, where no two logits are nearly alike.
            if dtype == "float32":
                inference = [check_greedy]
            else:
                inference = [check_prefill, check_serving]
            # A GPU would multiply float32 with 10 bits (TF32); other types have no other precision.
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                for group in (check_training, *inference):
                    try:
                        checks: Iterable[Check] = group(cfg, params, device, cpu)
                        yield from (check._replace(name=f"{name}, {dtype}: {check.name}") for check in checks)
                    except Exception as error:
                        why = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
                        yield Check(f"{name}, {dtype}: {why}", 1.0, 0.0)


def check_training(cfg: ModelConfig, params: Any, device: Any, cpu: Any) -> Iterator[Check]:
    """Yields the checks of a batch's loss and its gradient on `device` beside `cpu`: one text a
    row, and packed.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab, (ROWS, TOKENS + 1), dtype=np.int32)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1))
    documents = np.sort(rng.integers(0, 3, (ROWS, TOKENS)), axis=1).astype(np.int32)
    for kind, segments in (("", None), (", packed", documents)):
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((ROWS, TOKENS), bool), positions, segments)
        step = jax.jit(functools.partial(loss_and_gradient, cfg, frozen={}, batch=batch))
        ours, theirs = (on_device(place, step, params) for place in (device, cpu))
        for name, here, there in zip(("loss", "gradient"), ours, theirs):
            worst = max(map(_difference, jax.tree.leaves(here), jax.tree.leaves(there)))
            yield Check(f"{name}{kind}", worst, TOLERANCES[cfg.dtype])


def check_prefill(cfg: ModelConfig, params: Any, device: Any, cpu: Any) -> Iterator[Check]:
    """Yields the check of the logits after prompts of many lengths, read into a cache."""
    tokens = np.random.default_rng(2).integers(0, cfg.vocab, (ROWS, 64), dtype=np.int32)
    lengths = np.linspace(5, 64, ROWS).astype(np.int32)

    def read(params: Any) -> Any:
        logits, _ = prefill(cfg, prepare_params(cfg, params), tokens, lengths, make_cache(cfg, ROWS, 64))
        return logits

    yield Check(
        "prefill",
        _difference(on_device(device, read, params), on_device(cpu, read, params)),
        TOLERANCES[cfg.dtype],
    )


def check_greedy(cfg: ModelConfig, params: Any, device: Any, cpu: Any) -> Iterator[Check]:
    """Yields the check that greedy tokens of some prompts are the CPU's: the share of prompts in
    which they are not.
    """
    prompts = random_prompts(cfg, ROWS, TOKENS - NEW)

    def answers(params: Any) -> list[list[int]]:
        sampling = [SamplingParams(max_tokens=NEW, temperature=0.0)] * ROWS
        completions = complete(cfg, prepare_params(cfg, params), prompts, sampling, TOKENS)
        return [completion.tokens for completion in completions]

    pairs = list(zip(on_device(device, answers, params), on_device(cpu, answers, params), strict=True))
    yield Check("greedy tokens", sum(a != b for a, b in pairs) / len(pairs), 0)


def check_serving(cfg: ModelConfig, params: Any, device: Any, cpu: Any) -> Iterator[Check]:
    """Yields the checks on JAX's device that a request is answered alike alone and beside others,
    and that the weights stay.
    """
    del device, cpu
    changed_answers, weights_moved = serve_beside_others(cfg, prepare_params(cfg, params), TOKENS)
    yield Check("slots in which others change an answer", changed_answers, 0)
    yield Check("weights that serving changes", weights_moved, 0)


def on_device(device: Any, f: Callable[[Any], Any], params: Any) -> Any:
    """Returns f(params) as computed on a device, as NumPy arrays."""
    with jax.default_device(device):
        return jax.tree.map(np.asarray, f(jax.device_put(params, device)))


def _difference(actual: Any, expected: Any) -> float:
    """Returns the largest difference, as a share of the largest expected number; 0 where both sides
    are 0.
    """
    largest = float(jnp.abs(expected).max())
    return float(np.abs(actual - expected).max()) / (largest or 1.0)
