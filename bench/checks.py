"""Checks that a device computes what a CPU computes, and that no request there affects another or changes a weight."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.cli import Json, describe_error, print_table, progress
from bench.models import random_model
from engine.device import device_name
from engine.inference.config import EngineConfig
from engine.inference.decode import prefill, prepare_params
from engine.inference.engine import Engine, complete
from engine.inference.request import Request, SamplingParams
from engine.model.cache.contiguous import make_cache
from engine.model.config import ModelConfig, preset
from engine.storage.digest import digest
from engine.text.batch import Batch
from engine.training.step import loss_and_gradient

ROWS, TOKENS, NEW, SLOTS = 4, 256, 32, 8
# Relative to the largest number of each array. In bfloat16 they are sums of many roundings, in another order on each platform.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
GREEDY, SAMPLED = SamplingParams(max_tokens=NEW, temperature=0.0), SamplingParams(max_tokens=NEW, temperature=0.8, seed=5)


class Check(NamedTuple):
    """A comparison: how far two sides are apart, and how far they may be."""

    name: str
    difference: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.limit  # False for NaN too


def measure_checks() -> Json:
    """Runs every check on JAX's device beside the processor, prints the table, and returns the document."""
    checks = list(all_checks())
    number = "{:.2g}".format
    rows = [(check.name, number(check.difference), number(check.limit), "" if check.holds else "FAILS") for check in checks]
    print_table(f"{device_name()} beside the processor", ("check", "apart", "at most", ""), rows)
    return {"checks": [check._asdict() | {"holds": check.holds} for check in checks]}


def checked_models() -> dict[str, ModelConfig]:
    """Returns two small models that together have most of what a model can: q/k norm, shared key heads, heads tied and not."""
    small = dataclasses.replace(preset("smollm2-135m"), layers=2, vocab=4096, context=1024)
    return {"nano": preset("nano"), "two layers of smollm2": small}


def all_checks() -> Iterator[Check]:
    """Yields every check, on JAX's device beside the processor; one that cannot run fails, with the reason as its name."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    for name, plain in checked_models().items():
        params = random_model(name, plain).params
        progress(f"checking {name} beside the processor")
        for dtype in TOLERANCES:
            cfg = dataclasses.replace(plain, dtype=dtype)  # type: ignore[arg-type]
            arguments = cfg, params, device, cpu
            # Greedy tokens in float32, where no two logits are nearly alike.
            inference_checks = [functools.partial(check_greedy, *arguments)]
            if dtype == "bfloat16":
                inference_checks = [
                    functools.partial(check_prefill, *arguments),
                    functools.partial(checks_of_serving, cfg, params),
                ]
            groups: list[Callable[[], Iterable[Check]]] = [functools.partial(checks_of_training, *arguments), *inference_checks]
            # A GPU would multiply float32 with 10 bits (TF32); other types have no other precision.
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                for group in groups:
                    try:
                        yield from (check._replace(name=f"{name}: {check.name}") for check in group())
                    except Exception as error:
                        yield Check(f"{name}, {dtype}: {describe_error(error)[:120]}", 1.0, 0.0)


def checks_of_training(cfg: ModelConfig, params: Any, device: Any, cpu: Any) -> Iterator[Check]:
    """Yields the checks of a batch's loss and its gradient on `device` beside `cpu`: one text a row, and packed."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab, (ROWS, TOKENS + 1), dtype=np.int32)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1))
    documents = np.sort(rng.integers(0, 3, (ROWS, TOKENS)), axis=1).astype(np.int32)
    limit = TOLERANCES[cfg.dtype]
    for kind, segments in (("", None), (", packed", documents)):
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((ROWS, TOKENS), bool), positions, segments)
        step = lambda params, batch=batch: loss_and_gradient(cfg, params, {}, batch)
        (loss, gradient), (loss_cpu, gradient_cpu) = (_on(place, jax.jit(step), params) for place in (device, cpu))
        yield Check(f"loss, {cfg.dtype}{kind}", _difference(loss, loss_cpu), limit)
        worst = max(map(_difference, jax.tree.leaves(gradient), jax.tree.leaves(gradient_cpu)))
        yield Check(f"gradient, {cfg.dtype}{kind}", worst, limit)


def check_prefill(cfg: ModelConfig, params: Any, device: Any, cpu: Any) -> Iterator[Check]:
    """Yields the check of the logits after prompts of many lengths, read into a cache."""
    tokens = np.random.default_rng(2).integers(0, cfg.vocab, (ROWS, 64), dtype=np.int32)
    lengths = np.linspace(5, 64, ROWS).astype(np.int32)
    read = lambda params: prefill(cfg, prepare_params(cfg, params), tokens, lengths, make_cache(cfg, ROWS, 64))[0]
    logits, expected = (_on(place, read, params) for place in (device, cpu))
    yield Check(f"prefill, {cfg.dtype}", _difference(logits, expected), TOLERANCES[cfg.dtype])


def check_greedy(cfg: ModelConfig, params: Any, device: Any, cpu: Any) -> Iterator[Check]:
    """Yields the check that greedy tokens of some prompts are the CPU's: the share of prompts in which they are not."""
    prompts = _prompts(cfg, ROWS)

    def answers(params: Any) -> list[list[int]]:
        completions = complete(cfg, prepare_params(cfg, params), prompts, [GREEDY] * ROWS, TOKENS)
        return [completion.tokens for completion in completions]

    pairs = list(zip(_on(device, answers, params), _on(cpu, answers, params), strict=True))
    yield Check(f"greedy tokens, {cfg.dtype}", sum(a != b for a, b in pairs) / len(pairs), 0)


def checks_of_serving(cfg: ModelConfig, params: Any) -> Iterator[Check]:
    """Yields the checks that a request is answered alike, to the bit, alone and in every slot beside others, and that the
    weights stay."""
    served = prepare_params(cfg, params)
    engine = Engine(cfg, served, EngineConfig(SLOTS, TOKENS, prefix_cache_bytes=10**7))
    before = digest(engine.params)
    prompts = _prompts(cfg, SLOTS)

    def answer(place: int, beside: Sequence[Request]) -> tuple[Any, ...]:
        """Returns the tokens and log-probabilities of the first prompt, submitted at `place` among the requests `beside`."""
        request = Request(tuple(prompts[0]), SamplingParams(max_tokens=NEW, temperature=0.8, seed=9, logprobs=0))
        ids = [engine.submit(each) for each in (*beside[:place], request, *beside[place:])]
        tokens, logprobs = [], []
        while engine.busy:
            for event in engine.step():
                if event.id == ids[place]:
                    tokens += event.tokens
                    logprobs += [each.logprob for each in event.logprobs]
        return tuple(tokens), tuple(logprobs)

    neighbours = [Request(tuple(prompt), SAMPLED) for prompt in prompts[1:]]
    alone = answer(0, [])
    differ = sum(answer(place, neighbours) != alone for place in range(SLOTS))
    yield Check("answers that company changes, of 8", differ, 0)
    yield Check("weights that serving changes", digest(engine.params) != before, 0)


def _prompts(cfg: ModelConfig, count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, cfg.vocab, int(rng.integers(5, TOKENS - NEW))).tolist() for _ in range(count)]


def _on(device: Any, f: Callable[[Any], Any], params: Any) -> Any:
    """Returns f(params) as computed on a device, as NumPy arrays."""
    with jax.default_device(device):
        return jax.tree.map(np.asarray, f(jax.device_put(params, device)))


def _difference(actual: Any, expected: Any) -> float:
    """Returns the largest difference, as a share of the largest expected number; 0 where both sides are 0."""
    largest = float(jnp.abs(expected).max())
    return float(np.abs(actual - expected).max()) / (largest or 1.0)
