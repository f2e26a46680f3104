"""A conversation with a model: what was said so far, all of which is read again at every turn."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from engine.errors import UserError, nearest
from engine.inference import decode
from engine.inference.sampling_params import RANGES, SamplingParams
from engine.model.config import ModelConfig
from engine.text.chat import Chat
from stages.cli.flags import in_range

SETTINGS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")  # can be changed between turns
SMALLEST = 512  # places of the smallest cache; each larger one has twice as many, so that few programs are compiled


def with_setting(sampling: SamplingParams, name: str, value: str) -> SamplingParams:
    """The same with one of SETTINGS read from text. Raises UserError for an unknown name or a value out of range."""
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise UserError(f"There is no setting {name!r}; there are {', '.join(SETTINGS)}.{nearest(name, SETTINGS)}")
    try:
        return dataclasses.replace(sampling, **{name: in_range(RANGES[name])(value)})
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


class TooLong(UserError):
    """The conversation does not fit into the model's context. Nothing was left out; the person decides what goes."""


@dataclasses.dataclass
class Turn:
    """One question and its answer, and what they cost."""

    asked: str
    answered: str = ""
    read: int = 0  # tokens of the prompt, which is the whole conversation up to here
    wrote: int = 0
    first: float = 0.0  # seconds to the first token
    seconds: float = 0.0
    ended: str = ""  # stop, length, or interrupted


class Session:
    """What was said, and the way to say more. Weights are only read; between turns nothing is kept but this text."""

    def __init__(
        self, cfg: ModelConfig, params: Any, chat: Chat, ends: Collection[int], sampling: SamplingParams, system: str = ""
    ) -> None:
        self.cfg, self.params, self.chat, self.sampling, self.system = cfg, params, chat, sampling, system
        self.ends = {*ends, *([] if chat.end is None else [chat.end])}
        self.turns: list[Turn] = []

    def messages(self, asked: str, forget: int = 0) -> list[dict[str, str]]:
        """The conversation that the model reads when `asked` is said now, without the first `forget` turns."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[forget:]:
            said += [{"role": "user", "content": turn.asked}, {"role": "assistant", "content": turn.answered}]
        return [*said, {"role": "user", "content": asked}]

    def prompt(self, asked: str) -> list[int]:
        """Its tokens. Raises TooLong, naming the turns that would have to go, when they leave no room for an answer."""
        prompt = self.chat.prompt(self.messages(asked)).tolist()
        context = self.cfg.context
        if len(prompt) < context:
            return prompt
        for forget in range(1, len(self.turns) + 1):
            left = len(self.chat.prompt(self.messages(asked, forget)))
            if left < context:
                turns = "turn 1 no longer fits" if forget == 1 else f"turns 1 to {forget} no longer fit"
                raise TooLong(
                    f"The conversation has {len(prompt):,} tokens and the model's context {context:,}: {turns} "
                    f"({len(prompt) - left:,} tokens). /forget {forget} drops them, /clear drops everything."
                )
        raise TooLong(
            f"This message alone makes {len(self.chat.prompt(self.messages(asked, len(self.turns)))):,} tokens and the "
            f"model's context holds {context:,}; say it in fewer words."
        )

    def say(self, asked: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer, in pieces of whole characters as they come; it is kept when it is complete or `stopped` says so.

        Raises TooLong before anything is generated.
        """
        prompt = self.prompt(asked)
        turn = Turn(asked, read=len(prompt))
        begin = time.perf_counter()
        stream = self.chat.tokenizer.stream()
        for _, tokens, finished in self._generate(prompt, dataclasses.replace(self.sampling, stop_token_ids=self.ends)):
            turn.first = turn.first or time.perf_counter() - begin
            turn.wrote += len(tokens)
            text = "".join(map(stream.push, tokens)) + (stream.close() if finished else "")
            text = text if turn.answered else text.lstrip()  # templates that end with a name are answered by a space
            turn.answered += text
            yield text
            turn.ended = finished or ("interrupted" if stopped() else "")
            if turn.ended:
                break
        turn.seconds = time.perf_counter() - begin
        turn.answered = turn.answered.rstrip()
        if turn.answered:
            self.turns.append(turn)

    def warm(self) -> None:
        """Compiles, or fetches, the programs that turns run."""
        prompt = self.chat.prompt(self.messages("a")).tolist()
        if len(prompt) < self.cfg.context - 1:
            for _ in self._generate(prompt, SamplingParams(max_tokens=2)):
                pass

    def _generate(self, prompt: list[int], sampling: SamplingParams) -> Iterator[decode.Generated]:
        capacity = SMALLEST
        while capacity < len(prompt) + sampling.max_tokens:
            capacity *= 2
        return decode.generate(self.cfg, self.params, [prompt], [sampling], capacity=min(capacity, self.cfg.context))
