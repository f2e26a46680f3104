"""Request: one prompt to continue, and how; Event: what has become of it. Both plain data that check themselves."""

import dataclasses
import operator
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from engine.errors import UserError

MOST_TOP = 20  # log-probabilities of other tokens that a request may ask for beside its own
Finish = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt (T,) of token ids, and how it is to be continued.

    Sampling is as in `sample.Sampling`; temperature 0 is greedy, and a seed and a position give one draw. Penalties are
    subtracted from logits before temperature: `presence` once from every token already said in the completion,
    `frequency` once for each time it was said; `repetition` divides the positive logits of tokens of prompt and
    completion and multiplies the negative ones (Keskar et al. 2019, 1909.05858). `bias` is added to the logits of tokens.
    `logprobs`: None, or for each token its log-probability and those of so many of the most probable ones, as the model
    has them before any of this. `namespace`: prompts of one namespace share computed chunks, others never.

    Raises UserError, naming the field, for a value out of range.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    ends: Collection[int] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    namespace: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _tokens("prompt", self.prompt))
        object.__setattr__(self, "ends", frozenset(_tokens("ends", self.ends)))
        if not isinstance(self.bias, Mapping):
            raise UserError(f"bias must be tokens with a number each, not {self.bias!r}.")
        object.__setattr__(self, "bias", dict(zip(_tokens("bias", self.bias), self.bias.values())))
        if not isinstance(self.namespace, str):
            raise UserError(f"namespace must be a string, not {self.namespace!r}.")
        _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _within("temperature", self.temperature, 0, 100)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise UserError("top_p must be above 0 and at most 1 (all tokens), not 0.")
        _within("min_p", self.min_p, 0, 1)
        _within("seed", self.seed, 0, 2**32 - 1)
        _within("presence", self.presence, -100, 100)
        _within("frequency", self.frequency, -100, 100)
        _within("repetition", self.repetition, 0.01, 100)
        for token, value in self.bias.items():
            _within(f"bias of token {token}", value, -100, 100)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MOST_TOP)

    @property
    def changed(self) -> bool:
        """Whether logits are changed before a token is drawn from them: by a penalty or a bias."""
        return bool(self.presence or self.frequency or self.repetition != 1 or self.bias)


class LogProb(NamedTuple):
    """Of one token that was drawn: its log-probability, nats, and the most probable tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Event(NamedTuple):
    """News of a request: new tokens in order, their log-probabilities if it asked, and why it is finished, or None.

    'stop': an end token was drawn, which is not among the tokens. 'length': max_tokens are there. 'error': the model
    gave no numbers to draw from. `cached`: tokens of the prompt that had been computed before.
    """

    id: int
    tokens: list[int]
    logprobs: list[LogProb]
    finished: Finish | None
    cached: int


def check(request: Request, vocab: int, capacity: int) -> None:
    """Raises UserError when a model of `vocab` tokens and room for `capacity` cannot serve the request to its end."""
    prompt = request.prompt
    if not prompt:
        raise UserError("The prompt has no tokens; give at least one.")
    for name, tokens in (("prompt", prompt), ("bias", request.bias), ("ends", request.ends)):
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
            raise UserError(f"The {name} holds a token outside the vocabulary of {vocab}.")
    if len(prompt) + request.max_tokens > capacity:
        raise UserError(
            f"The prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}; together at most {capacity} fit. "
            "Shorten the prompt, or ask for fewer tokens."
        )


def _tokens(name: str, given: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(token) for token in given)
    except TypeError as error:
        raise UserError(f"{name} must hold token ids, which are whole numbers: {error}.") from None


def _within(name: str, value: float, least: float, most: float) -> None:
    whole = isinstance(least, int) and name in ("max_tokens", "top_k", "seed", "logprobs")
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value != value:
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r:.60}.")
    if not least <= value <= most:
        said = value if abs(value) < 10**30 else "a number of more than 30 digits"
        raise UserError(f"{name} must lie between {least} and {most}, not {said}.")
