"""Request: a prompt and its sampling parameters; Event: its new tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from engine.errors import InvalidField
from engine.inference.sampling_params import SamplingParams, token_ids

FinishReason = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of token ids, and how to continue it. Only prompts of one `namespace` share the prefix cache.

    Raises InvalidField.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    namespace: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", token_ids("prompt", self.prompt))
        if not isinstance(self.namespace, str):
            raise InvalidField("namespace", f"namespace must be a string, not {self.namespace!r:.60}.")


class LogProb(NamedTuple):
    """A sampled token's log-probability, nats, and the most probable tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Event(NamedTuple):
    """New tokens of a request (of `generate`: of prompt number `id`), and why it is finished: stop, length, error; or None.

    'stop': a stop token was sampled, which is not among the tokens. 'length': max_tokens are there. 'error': the logits
    were no numbers. `cached_tokens` of the prompt came from the prefix cache.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: Sequence[LogProb] = ()
    cached_tokens: int = 0


def check_request(request: Request, vocab: int, capacity: int) -> None:
    """Raises InvalidField when a model of `vocab` tokens with room for `capacity` cannot serve the request to its end."""
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise InvalidField("prompt", "The prompt has no tokens; give at least one.")
    fields = {"prompt": prompt, "logit_bias": sampling.logit_bias, "stop_token_ids": sampling.stop_token_ids}
    for name, tokens in fields.items():
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
            raise InvalidField(name, f"The {name} holds a token outside the vocabulary of {vocab}.")
    if len(prompt) + sampling.max_tokens > capacity:
        raise InvalidField(
            "prompt",
            f"The prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}; together at most {capacity} fit. "
            "Shorten the prompt, or ask for fewer tokens.",
        )
