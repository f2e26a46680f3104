"""Holds a chat session, in which the model prefills the whole conversation again at every turn."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from engine.errors import UserError, did_you_mean
from engine.inference.request import RANGES, Event, Request, SamplingParams
from engine.inference.scheduler import DRAFT_ROWS
from engine.inference.slots import CHUNK, Slots
from engine.model.config import ModelConfig
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.tokenizer import CompletionText
from stages.cli.flags import CompletionFlags, in_range

SETTINGS = tuple(field.name for field in dataclasses.fields(CompletionFlags))  # that can be changed between turns
MIN_CAPACITY = 512  # of a KV cache; doubled as needed: few programs


def with_setting(sampling: SamplingParams, name: str, text: str) -> SamplingParams:
    """Returns `sampling` with `name`, one of SETTINGS, parsed from text. Raises UserError for a wrong name or value."""
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise UserError(f"There is no setting {name!r}; there are {', '.join(SETTINGS)}.{did_you_mean(name, SETTINGS)}")
    try:
        return dataclasses.replace(sampling, **{name: in_range(RANGES[name])(text)})
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


@dataclasses.dataclass
class Turn:
    """A message, its completion (ended by stop, length or interrupted), and their cost. Seconds count from the message."""

    message: str
    completion: str = ""
    prompt_tokens: int = 0  # of the whole conversation up to here
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    finish_reason: str = ""


@dataclasses.dataclass
class ChatSession:
    """A model and the turns so far, as text: no KV cache is kept between turns."""

    cfg: ModelConfig
    params: Any
    chat: ChatTokenizer
    eos_ids: Collection[int]  # tokens that end a completion, as do `chat.eot_ids`
    sampling: SamplingParams
    system: str = ""
    turns: list[Turn] = dataclasses.field(default_factory=list)
    _slots: Slots | None = None

    def messages(self, message: str, skip: int = 0) -> list[dict[str, str]]:
        """Returns the messages that the model reads to answer, without the first `skip` turns."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[skip:]:
            messages += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.completion}]
        return [*messages, {"role": "user", "content": message}]

    def prompt(self, message: str) -> list[int]:
        """Tokenizes these messages. Raises UserError when no room is left to answer: the user decides which turns to drop."""
        context, prompt = self.cfg.context, self.chat.prompt(self.messages(message)).tolist()
        skip, left = 0, len(prompt)
        while left >= context and skip < len(self.turns):
            skip += 1
            left = len(self.chat.prompt(self.messages(message, skip)))
        if left >= context:
            raise UserError(
                f"This message alone makes {left:,} tokens and the model's context holds {context:,}; say it in fewer words."
            )
        if skip:
            turns = "turn 1 no longer fits" if skip == 1 else f"turns 1 to {skip} no longer fit"
            raise UserError(
                f"The conversation has {len(prompt):,} tokens and the model's context {context:,}: {turns} "
                f"({len(prompt) - left:,} tokens). /forget {skip} drops them, /clear drops everything."
            )
        return prompt

    def reply(self, message: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Streams the completion in pieces of whole characters; adds the turn at its end, or once `is_stopped`.

        Raises UserError as `prompt`, before anything is generated.
        """
        prompt = self.prompt(message)
        turn, completion = Turn(message, prompt_tokens=len(prompt)), CompletionText(self.chat.tokenizer.stream())
        begin = time.perf_counter()
        sampling = dataclasses.replace(self.sampling, stop_token_ids={*self.eos_ids, *self.chat.eot_ids})
        for _, tokens, finish_reason, *_ in self._generate(prompt, sampling):
            turn.first_token_seconds = turn.first_token_seconds or time.perf_counter() - begin
            text = completion.push(tokens) + (completion.close() if finish_reason else "")
            text = text if turn.completion else text.lstrip()  # a space follows the name that ends a plain template
            turn.completion += text
            yield text
            turn.finish_reason = finish_reason or ("interrupted" if is_stopped() else "")
            if turn.finish_reason:
                break
        turn.seconds, turn.completion_tokens = time.perf_counter() - begin, completion.tokens
        turn.completion = turn.completion.rstrip()
        if turn.completion:
            self.turns.append(turn)

    def warm(self) -> None:
        """Compiles the programs that turns run, or loads them from the compilation cache."""
        prompt = self.chat.prompt(self.messages("a")).tolist()
        if len(prompt) < self.cfg.context - 1:
            for _ in self._generate(prompt, SamplingParams(max_tokens=2)):
                pass

    def _generate(self, prompt: list[int], sampling: SamplingParams) -> Iterator[Event]:
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, self.cfg.context - len(prompt)))
        capacity = MIN_CAPACITY
        while capacity < len(prompt) + sampling.max_tokens:
            capacity *= 2
        capacity = min(capacity, self.cfg.context)
        if self._slots is None or self._slots.capacity != capacity:
            self._slots = Slots(
                self.cfg, self.params, slots=1 + DRAFT_ROWS, capacity=capacity, kv_dtype=self.cfg.dtype,
                tail=CHUNK,  # one program for prompts of any length, which `warm` has compiled
            )  # fmt: skip
        id = self._slots.submit(Request(tuple(prompt), sampling))
        try:
            while self._slots.busy:
                yield from self._slots.step()
        finally:
            self._slots.cancel(id)
