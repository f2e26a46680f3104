"""Request: a prompt and its SamplingParams, with the ranges of their fields; Event: its new tokens.

Imports no jax: flags read it.
"""

import dataclasses
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from engine.errors import InvalidField, Range

if TYPE_CHECKING:  # flags read this file, and need no tokenizer
    from engine.inference.constraints import Constraint

FinishReason = Literal["stop", "length", "error", "grammar"]
MAX_LOGPROBS = 20  # alternatives a token, at most
SEEDS = 2**32

RANGES = {
    "max_tokens": Range(1, 2**31 - 1, integer=True),
    "min_tokens": Range(0, 2**31 - 1, integer=True),
    "temperature": Range(0, 2, note=" (greedy)"),
    "top_k": Range(-1, 2**31 - 1, integer=True, note=" or 0 (all tokens)"),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1, note=" (all tokens)"),
    "seed": Range(0, SEEDS - 1, integer=True),
    "presence_penalty": Range(-100, 100),
    "frequency_penalty": Range(-100, 100),
    "repetition_penalty": Range(0.01, 100),
    "logit_bias": Range(-100, 100),  # each value of it
    "logprobs": Range(0, MAX_LOGPROBS, integer=True),
}


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one completion is sampled, and which tokens end it: some fields of vLLM's, with its
    defaults.

    Bias and penalties change the logits first. Then they are divided by the temperature, and the
    thresholds choose among the tokens; those as probable as the last one that passes pass too.
    Raises InvalidField for a value out of RANGES.
    """

    # Tokens of the completion, at most.
    max_tokens: int = 16
    # 0 is greedy.
    temperature: float = 1.0
    # The k most probable tokens pass (0 or -1: all).
    top_k: int = 0
    # The smallest set whose probability reaches p passes (Holtzman et al. 2019, 1904.09751).
    top_p: float = 1.0
    # Tokens at least min_p times as probable as the best pass (Nguyen et al. 2024, 2407.01082).
    min_p: float = 0.0
    # Of the keys by which tokens are drawn.
    seed: int = 0
    # Subtracted once from the logit of every token in the completion.
    presence_penalty: float = 0.0
    # Subtracted once for each time that the token is in the completion.
    frequency_penalty: float = 0.0
    # Divides positive and multiplies negative logits of tokens of prompt and completion (Keskar et al.
    # 2019, 1909.05858).
    repetition_penalty: float = 1.0
    # Added to the logits of tokens.
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    # How many of the most probable tokens get their log-probabilities beside each sampled one, before
    # any of this and before a grammar's mask; None for no log-probabilities at all.
    logprobs: int | None = None
    # Each ends the completion, and is not part of it.
    stop_token_ids: Collection[int] = ()
    # No token of `stop_token_ids` is sampled before so many.
    min_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "stop_token_ids", frozenset(token_ids("stop_token_ids", self.stop_token_ids))
        )
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidField(
                "logit_bias", f"logit_bias must be tokens with a number each, not {self.logit_bias!r:.60}."
            )
        bias = dict(zip(token_ids("logit_bias", self.logit_bias), self.logit_bias.values()))
        object.__setattr__(self, "logit_bias", bias)
        for name, allowed in RANGES.items():
            if name not in ("logit_bias", "logprobs"):
                allowed.check(name, getattr(self, name))
        for token, value in bias.items():
            RANGES["logit_bias"].check(f"logit_bias of token {token}", value, "logit_bias")
        if self.logprobs is not None:
            RANGES["logprobs"].check("logprobs", self.logprobs)
        if self.min_tokens > self.max_tokens:
            raise InvalidField(
                "min_tokens", f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}."
            )

    @property
    def adjusts_logits(self) -> bool:
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias
        )

    def within(self, room: int) -> "SamplingParams":
        """Returns these with `max_tokens` of at most `room`, and at least 1. `check_request` refuses
        the prompt that leaves no room for one token.
        """
        return dataclasses.replace(self, max_tokens=min(self.max_tokens, max(room, 1)))

    def per_row(self, rows: int) -> list["SamplingParams"]:
        """Returns these for each of `rows` completions, with seeds seed, seed + 1, ... (modulo 2**32)."""
        return [dataclasses.replace(self, seed=(self.seed + row) % SEEDS) for row in range(rows)]


def token_ids(name: str, values: Any) -> tuple[int, ...]:
    """Returns any iterable of integers as a tuple; True is 1. Raises InvalidField for anything else."""
    try:
        return tuple(map(operator.index, values))
    except TypeError as error:
        raise InvalidField(name, f"{name} must hold token ids, which are integers: {error}.") from None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in an engine: the digest of its weights, and its index in the stacks, from 1 on."""

    digest: str
    index: int


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of token ids, and how to continue it. Only prompts of one `namespace` and `adapter`
    share the prefix cache.

    The completion keeps to the grammar of `constraint`. With `embed` the prompt's embedding is
    asked for instead.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    namespace: str = ""
    constraint: "Constraint | None" = None
    embed: bool = False
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", token_ids("prompt", self.prompt))
        if not isinstance(self.namespace, str):
            raise InvalidField("namespace", f"namespace must be a string, not {self.namespace!r:.60}.")

    @property
    def adapter_index(self) -> int:
        return self.adapter.index if self.adapter else 0


class LogProb(NamedTuple):
    """A sampled token and its log-probability in nats; `top` pairs the most probable tokens with
    theirs, the most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Event(NamedTuple):
    """New tokens of a request, and why it is finished: stop, length, error, grammar; or None.

    'stop': by `stop_token`, which is not among the tokens, or at the grammar's end. 'error': the
    logits were no numbers. 'grammar': it became too complex to be followed. `cached_tokens` of the
    prompt came from the prefix cache. `embedding` (D,) float32: the mean over the prompt's tokens
    of the head's input. `prompt_seconds`, `completion_seconds`: the request's share of the engine's
    time until now.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: Sequence[LogProb] = ()
    cached_tokens: int = 0
    stop_token: int | None = None
    embedding: Any = None
    prompt_seconds: float = 0.0
    completion_seconds: float = 0.0


class Completion(NamedTuple):
    """The tokens of a completion, without the `stop_token` that ended it if one did, and why it ended."""

    tokens: list[int]
    finish_reason: FinishReason | None
    stop_token: int | None


def check_request(request: Request, vocab: int, capacity: int) -> None:
    """Raises InvalidField when a model of `vocab` tokens with room for `capacity` cannot serve the
    request to its end.
    """
    prompt = request.prompt
    sampling = request.sampling
    if not prompt:
        raise InvalidField("prompt", "The prompt has no tokens; give at least one.")
    fields = {"prompt": prompt, "logit_bias": sampling.logit_bias, "stop_token_ids": sampling.stop_token_ids}
    for name, tokens in fields.items():
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
            raise InvalidField(name, f"The {name} holds a token outside the vocabulary of {vocab}.")
    if len(prompt) >= capacity:
        raise InvalidField(
            "prompt",
            f"The prompt has {len(prompt)} tokens, "
            f"and at most {capacity} fit with the answer. Shorten the prompt.",
        )
    if len(prompt) + sampling.max_tokens > capacity:
        raise InvalidField(
            "prompt",
            f"The prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}; "
            f"together at most {capacity} fit. Shorten the prompt, or ask for fewer tokens.",
        )
