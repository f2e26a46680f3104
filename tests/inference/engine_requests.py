"""Fixtures for the tests of slots: tiny models as they are served, requests of every kind, and slots full of rubbish."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken

from engine.inference import backend
from engine.inference.config import EngineConfig
from engine.inference.constraints import Constraint, GrammarCompiler
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.grammars import json_grammar, regex_grammar
from engine.inference.request import Event, Request
from engine.model.paths import map_paths
from engine.model.weights import blocks, stacked_lora
from engine.model.weights.block_layout import GROUP, pack_blocks
from engine.model.weights.blocks import Blocks
from engine.model.weights.int8 import quantize
from tests.tiny import lively_params, request_of, tiny_config, tokens_of

SLOTS, CAPACITY, CHUNK, TAIL = 5, 62, 16, 4
DTYPES = ("float32", "bfloat16", "int8")  # of weights, and of the KV cache
AS_SERVED = "file/bfloat16"  # weights in the one, KV cache in the other: a server's defaults


class Completion(NamedTuple):
    """All there is to a completion, log-probabilities as their bits."""

    tokens: tuple[int, ...]
    logprobs: tuple[Any, ...]
    finish_reason: str


@functools.cache
def served_model(dtype: str) -> tuple[Any, Any]:
    """(cfg, params) as they are served. float32 computes in it; the others in bfloat16, int8 with
    W8A8, a file's in blocks.
    """
    weights = dtype.partition("/")[0]
    if weights == "file":
        options = EngineConfig(weights="file")
        cfg = options.model_config(tiny_config(dtype="bfloat16", tied=True, width=64, ff=96))
        return cfg, options.prepare_params(cfg, map_paths(to_blocks, lively_params(cfg, 3)))
    cfg = tiny_config(dtype="float32" if weights == "float32" else "bfloat16", tied=weights == "int8")
    params = lively_params(cfg, 3)
    return cfg, prepare_params(cfg, quantize(params) if weights == "int8" else params)


def to_blocks(path: str, leaf: Any) -> Any:
    """Returns a matrix as a GGUF file's blocks, if it has any: those of `down` in one kind, the
    embedding in another.
    """
    if leaf.ndim < 2 or leaf.shape[-1 if path == "embed" else 0] % GROUP:
        return leaf
    kind = "Q8_0" if path == "embed" else "Q4_0" if path.endswith("down") else "Q4_1"
    rows = np.ascontiguousarray(leaf if path == "embed" else leaf.T, np.float32)
    packed = pack_blocks(gguf.quantize(rows, gguf.GGMLQuantizationType[kind]), kind)
    return Blocks(jnp.asarray(packed), len(rows), int(path != "embed"))


def make_engine(dtype: str, **options: Any) -> Engine:
    cfg, params = served_model(dtype)
    shape = {
        "slots": SLOTS,
        "capacity": CAPACITY,
        "kv_dtype": dtype.rpartition("/")[2],
        "chunk": CHUNK,
        "tail": TAIL,
    }
    return Engine(cfg, options.pop("params", params), EngineConfig(**{**shape, **options}))


class Letters:
    """As much of a tokenizer as a grammar needs: a letter a token, and two that end a text."""

    SYMBOLS = '{}[]":, -.0123456789abcdefghijklmnopqrs'

    def __init__(self) -> None:
        self.controls = {39: AddedToken("<end>"), 40: AddedToken("<over>")}

    def bytes_of(self, token: int) -> bytes:
        return b"" if token in self.controls else self.SYMBOLS[token].encode()

    def encode(self, text: str, continued: bool = False) -> Any:
        return np.array([self.SYMBOLS.index(letter) for letter in text if letter in self.SYMBOLS])

    def decode(self, tokens: Any) -> str:
        return b"".join(map(self.bytes_of, tokens)).decode()


LETTERS: Any = Letters()
# A record whose keys and signs are forced, where the model decides letters, a number and whether to
# go on; words; anything.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-s]{1,4}$"},
        "age": {"enum": [1, 20, 99]},
        "more": {"type": "array", "items": {"enum": ["red", "blackish"]}, "maxItems": 2},
    },
    "required": ["name", "age", "more"],
    "additionalProperties": False,
}
GRAMMARS = [json_grammar(SCHEMA), regex_grammar("(one|two, )*[a-f]{3}"), json_grammar({"type": "object"})]


@functools.cache
def constraint_of(grammar: str) -> Constraint:
    return GrammarCompiler(LETTERS, 41, LETTERS.controls).compile(grammar)


class Log:
    """All events of every request, in the order in which they came."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[Event]] = {}

    @property
    def finished(self) -> dict[int, str]:
        return {
            id: events[-1].finish_reason
            for id, events in self.events.items()
            if events and events[-1].finish_reason
        }

    def submit(self, request: Request) -> int:
        id = self.engine.submit(request)
        assert id not in self.events
        self.requests[id], self.events[id] = request, []
        return id

    def step(self) -> None:
        for event in self.engine.step():
            assert event.id not in self.finished, "nothing comes behind the end"
            assert event.tokens or event.finish_reason
            assert len(event.logprobs) == (
                0 if self.requests[event.id].sampling.logprobs is None else len(event.tokens)
            )
            self.events[event.id].append(event)

    def drain(self) -> None:
        while self.engine.busy:
            self.step()

    def completion(self, id: int) -> Completion:
        bits = lambda value: np.float32(value).tobytes()
        tokens = tuple(token for event in self.events[id] for token in event.tokens)
        logprobs = tuple(
            (token, bits(logprob), tuple((other, bits(value)) for other, value in top))
            for event in self.events[id]
            for token, logprob, top in event.logprobs
        )
        return Completion(tokens, logprobs, self.finished[id])


def complete(engine: Engine, requests: list[Request]) -> list[Completion]:
    """The completions of requests that are submitted at once."""
    log = Log(engine)
    ids = [log.submit(request) for request in requests]
    log.drain()
    return [log.completion(id) for id in ids]


def complete_alone(dtype: str, request: Request) -> Completion:
    """The completion when there never was another request: no draft tokens, no cached chunks, clean
    slots.
    """
    key = dtype, repr(request), backend.computes_in_c()
    if key not in _alone:
        (_alone[key],) = complete(make_engine(dtype, speculate=False), [request])
        assert _alone[key].finish_reason != "error", "no numbers at all would be the same in any company"
    return _alone[key]


_alone: dict[tuple[str, str, bool], Completion] = {}


@contextlib.contextmanager
def attends_by_xla() -> Iterator[None]:
    """Attention, adapters and the products of blocks as where the kernels in C cannot be built."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, stacked_lora, backend):
            patch.setattr(module, "computes_in_c", lambda: False)
        jax.clear_caches()
        yield
    jax.clear_caches()


def text(seed: int, length: int) -> list[int]:
    """Tokens that begin alike, for the prefix cache, whose second half repeats the first, for draft
    tokens.
    """
    begin = tokens_of(7, 40).tolist()
    own = tokens_of(seed, length).tolist()
    whole = (begin[: length // 2] + own)[:length] if seed % 2 else own
    return whole if seed % 3 else (whole[: (length + 1) // 2] * 2)[:length]


def _requests() -> list[Request]:
    """Fifty of them, fixed, so that the completion of each alone is computed once."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 4, 5, 6, 16, 17, 18, 20, 21, 32, 33, 34, 40, 48, 50, 55]
    options = [
        [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.4, "top_p": 0.9},
            {"temperature": 1.3, "top_k": 5},
            {"temperature": 0.9, "min_p": 0.1, "top_k": 9, "top_p": 0.8},
        ],
        [
            {},
            {},
            {},
            {"presence_penalty": 0.7},
            {"frequency_penalty": 0.4, "repetition_penalty": 1.2},
            {"logit_bias": {3: 4.0, 5: -100.0}},
        ],
        [{}, {}, {"stop_token_ids": (3,)}, {"stop_token_ids": (1, 2, 9), "min_tokens": 1}],
        [{"logprobs": None}, {"logprobs": 0}, {"logprobs": 3}, {"logprobs": 20}],
        [{}, {}, {"namespace": "key"}],
        [
            {},
            {},
            {},
            *({"constraint": constraint_of(grammar), "stop_token_ids": (39, 40)} for grammar in GRAMMARS),
        ],
    ]
    requests = []
    for number in range(50):
        length = lengths[number % len(lengths)]
        fields = {
            name: value for choices in options for name, value in choices[rng.integers(len(choices))].items()
        }
        max_tokens = min([1, 2, 7, 12, 20, 99][rng.integers(6)], CAPACITY - length)
        requests.append(request_of(text(number, length), max_tokens, seed=int(rng.integers(2**32)), **fields))
    return requests


REQUESTS = _requests()
REPEATING = (text(2, 9) * 4)[:33]


def poison(engine: Engine, rubbish: float) -> None:
    """Fills all that belongs to free slots: their content, and what another request left there,
    cannot matter.
    """
    free = list(engine.scheduler.free)
    engine.used_slots.update(free)

    def spoil(array: Any) -> Any:
        array = np.array(array)
        array[free] = rubbish if array.dtype.kind != "i" and array.dtype != np.int8 else 99
        return array

    engine.runner.segments, engine.runner.counts = jax.tree.map(
        lambda array: jax.device_put(jnp.asarray(spoil(array)), jax.devices()[0]),
        (engine.runner.segments, engine.runner.counts),
    )
