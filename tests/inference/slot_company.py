"""What the tests of slots share: a few tiny models as they are served, requests of every kind, and slots full of rubbish."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from tiny import lively_params, request_of, tiny_config, tokens_of

from engine.inference.decode import for_inference
from engine.inference.quantize import quantize
from engine.inference.request import Request
from engine.inference.slots import Slots

SLOTS, CAPACITY, CHUNK, TAIL = 5, 62, 16, 4
WAYS = ("float32", "bfloat16", "int8")  # what weights, and keys and values, are kept as
AS_SERVED = "int8/bfloat16"  # weights in the one, keys and values in the other: a server's way unless it is told another


class Answer(NamedTuple):
    """All there is to an answer, log-probabilities as their bits."""

    tokens: tuple[int, ...]
    logprobs: tuple[Any, ...]
    finished: str


@functools.cache
def served(way: str) -> tuple[Any, Any]:
    """(cfg, params) as they are served. float32 computes in it; the others in bfloat16, int8 with W8A8."""
    weights = way.partition("/")[0]
    cfg = tiny_config(dtype="float32" if weights == "float32" else "bfloat16", tied=weights == "int8")
    params = lively_params(cfg, 3)
    return cfg, for_inference(cfg, quantize(params) if weights == "int8" else params)


def made(way: str, **options: Any) -> Slots:
    cfg, params = served(way)
    shape = {"slots": SLOTS, "capacity": CAPACITY, "chunk": CHUNK, "tail": TAIL}
    return Slots(cfg, params, **{**shape, "kind": way.rpartition("/")[2], **options})


class Heard:
    """What has been heard of every request, in the order in which it came."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.finished: dict[int, str] = {}
        self.cached: dict[int, int] = {}
        self.steps = 0

    def submit(self, request: Request) -> int:
        id = self.slots.submit(request)
        assert id not in self.tokens
        self.tokens[id], self.logprobs[id] = [], []
        return id

    def step(self) -> None:
        self.steps += 1
        for event in self.slots.step():
            assert event.id not in self.finished, "nothing comes behind the end"
            assert event.tokens or event.finished
            self.tokens[event.id] += event.tokens
            self.logprobs[event.id] += [
                (token, np.float32(logprob).tobytes(), tuple((other, np.float32(value).tobytes()) for other, value in top))
                for token, logprob, top in event.logprobs
            ]
            self.cached[event.id] = event.cached
            if event.finished:
                self.finished[event.id] = event.finished

    def drain(self) -> None:
        while self.slots.busy:
            self.step()

    def answer(self, id: int) -> Answer:
        return Answer(tuple(self.tokens[id]), tuple(self.logprobs[id]), self.finished[id])


@functools.cache
def _alone(way: str, number: int) -> Answer:
    heard = Heard(made(way, guesses=False))
    id = heard.submit(REQUESTS[number])
    heard.drain()
    assert heard.finished[id] != "error", "no numbers at all would be the same in any company"
    return heard.answer(id)


def alone(way: str, request: Request) -> Answer:
    """What a request is answered when there never was another: no guesses, no computed chunks, clean slots."""
    if request not in REQUESTS:
        REQUESTS.append(request)
    return _alone(way, REQUESTS.index(request))


def text(seed: int, length: int) -> list[int]:
    """Texts that begin alike, for the cache, the second half of which says the first again, for guesses."""
    begin = tokens_of(7, 40).tolist()
    own = tokens_of(seed, length).tolist()
    whole = (begin[: length // 2] + own)[:length] if seed % 2 else own
    return whole if seed % 3 else (whole[: (length + 1) // 2] * 2)[:length]


def _requests() -> list[Request]:
    """Fifty of them, fixed, so that what each is answered alone is found out once."""
    rng, found = np.random.default_rng(0), []
    lengths = [1, 2, 3, 4, 5, 6, 16, 17, 18, 20, 21, 32, 33, 34, 40, 48, 50, 55]
    draws = [
        {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.4, "top_p": 0.9}, {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "min_p": 0.1, "top_k": 9, "top_p": 0.8},
    ]  # fmt: skip
    changes = [
        {}, {}, {}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.4, "repetition_penalty": 1.2},
        {"logit_bias": {3: 4.0, 5: -100.0}},
    ]  # fmt: skip
    for number in range(50):
        length = lengths[number % len(lengths)]
        pick = lambda options: options[rng.integers(len(options))]
        found.append(
            request_of(
                text(number, length), min(pick([1, 2, 7, 12, 20, 99]), CAPACITY - length),
                stop_token_ids=pick([(), (), (3,), (1, 2, 9)]), seed=int(rng.integers(2**32)), logprobs=pick([None, 0, 3, 20]),
                namespace=pick(["", "", "key"]), **pick(draws), **pick(changes),
            )
        )  # fmt: skip
    return found


REQUESTS = _requests()
requests = st.sampled_from(list(REQUESTS))


def poison(slots: Slots, rubbish: float) -> None:
    """Fills all that belongs to slots nobody holds: what was there, and what another request left, cannot matter."""
    free = list(slots._free)

    def spoilt(array: Any) -> Any:
        array = np.array(array)
        array[free] = rubbish if array.dtype.kind != "i" and array.dtype != np.int8 else 99
        return array

    slots._spans, slots._tally = jax.tree.map(
        lambda array: jax.device_put(jnp.asarray(spoilt(array)), jax.devices()[0]), (slots._spans, slots._tally)
    )
