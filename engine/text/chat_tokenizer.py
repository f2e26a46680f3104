"""Tokenizes conversations by a template, with a mask of the assistant's tokens; users' text stays text."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.text.template import FIXED_DAY, InvalidConversation, Message, Template
from engine.text.tokenizer import Tokenizer

TEMPLATES = Path(__file__).with_name("templates")
# For a model that has its control tokens and no template of its own: the format of Qwen and SmolLM.
CHATML = (TEMPLATES / "chatml.jinja").read_text("utf-8").rstrip()
# For a model without control tokens for roles, such as one trained here from nothing: names and line
# ends as in a play. Only the end of an answer is a control token, so it keeps a user from ending the
# answer but not from writing a role.
PLAIN = (TEMPLATES / "plain.jinja").read_text("utf-8").rstrip()
ROLES = ("system", "user", "assistant", "tool")
PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode's private use: no character of any text
COMPARED = ("role", "type")  # fields of messages and tools by which templates choose what to write


class Example(NamedTuple):
    tokens: np.ndarray  # (T,) int32
    mask: np.ndarray  # (T,) bool: True for the tokens of the loss
    where: str  # file:line
    weight: float = 1.0  # by which its loss is multiplied in training


class Rendering(NamedTuple):
    """A conversation as text, the (start, stop) of the assistant's turns in it, and the character that
    each mark in it stands for (`_mask_controls`).
    """

    text: str
    turns: list[tuple[int, int]]
    marks: dict[str, str]


class ChatTokenizer:
    """Tokenizes conversations by a chat template, as prompts or as training examples.

    source: the template. template_name: which it is, as `choose_template` says. now: the time that
    it reads. eot_ids: the control token by which it closes the assistant's turns, (token,) or ().

    The template's control tokens become ids; one written in a message is encoded as its letters.
    Text is cut where an assistant's turn begins and ends, so that the tokens before an answer are
    the same in training and in a prompt. Raises UserError when the template cannot be compiled or
    run.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, now: str = FIXED_DAY) -> None:
        self.tokenizer = tokenizer
        self.now = now
        self.source, self.template_name = choose_template(tokenizer, source)
        self._ids = {added.content: token for token, added in tokenizer.controls.items()}
        self._controls = _pattern(tokenizer)
        self._beginnings: set[str] = set()
        self._endings: set[str] = set()
        for name in self._ids:
            for size in range(1, len(name)):
                self._beginnings.add(name[:size])
                self._endings.add(name[-size:])
        self.template = Template(self.source, tokenizer.special_names, now)
        probe = self.examples([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[0]
        answer = probe.tokens[probe.mask]
        if not len(answer):
            raise UserError(
                "The chat template writes nothing of what the assistant says: give another template."
            )
        last = int(answer[-1])
        self.eot_ids = (last,) if last in tokenizer.controls else ()

    def close(self) -> None:
        self.template.close()

    def prompt(
        self, messages: Sequence[Message], answer: str = "", more: Mapping[str, Any] = MappingProxyType({})
    ) -> np.ndarray:
        """Tokenizes a conversation and its generation prompt, the beginning of the assistant's next
        turn: (T,) int32.

        `answer`: the text that this turn has so far. `more`: what else the template reads, such as
        `tools`. Raises UserError as `Template.render`.
        """
        prompt = np.concatenate(self._pieces(self._render(messages, True, more)))
        if not answer:
            return prompt
        continued = len(prompt) > 0 and int(prompt[-1]) not in self.tokenizer.controls
        return np.concatenate([prompt, self.tokenizer.encode(answer, continued)])

    def examples(
        self, messages: Sequence[Message], where: str = "", context: frozenset[int] = frozenset()
    ) -> list[Example]:
        """Makes the training examples of a conversation, with the assistant's turns and the tokens
        that end them in the loss.

        Turns in `context`, by their index, are not in it. Usually one example; where the template
        writes a turn otherwise once it is history (it may leave out reasoning), one a turn.
        Messages after the last turn in the loss are left out. Raises InvalidConversation when there
        is no such turn or nothing before it, UserError when the template writes a turn otherwise
        than it begins one, and as `prompt`.
        """
        answers = _answers(messages)
        trained = [index for index in answers if index not in context]
        if not answers:
            raise InvalidConversation("there is no turn of the assistant")
        if not trained:
            raise InvalidConversation("no turn of the assistant is trained on")
        if answers[0] == 0:
            raise InvalidConversation("it begins with the assistant's turn")
        messages = messages[: trained[-1] + 1]
        in_loss = [index in trained for index in _answers(messages)]
        rendering = self._render(messages)
        if len(rendering.turns) == len(in_loss):
            return [self._example(rendering, in_loss, where)]
        return [self.answer_example(messages[: last + 1], where) for last in trained]

    def answer_example(self, messages: Sequence[Message], where: str = "") -> Example:
        """Makes an example with only the assistant's turn at the end of the messages in the loss.
        Raises as `examples`.
        """
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InvalidConversation("it does not end with an answer of the assistant to something")
        rendering = self._render(messages)
        earlier = [False] * (len(rendering.turns) - 1)
        return self._example(rendering, [*earlier, True], where)

    def marked_pieces(self, example: Example) -> Iterator[tuple[str, bool]]:
        """Yields the text of an example in pieces, control tokens by their names, and whether each
        is in the loss.
        """
        controls = self.tokenizer.controls

        def kind(pair: tuple[int, bool]) -> tuple[bool, bool]:
            token, in_loss = pair
            return in_loss, token in controls

        pairs = zip(example.tokens.tolist(), example.mask.tolist())
        for (in_loss, are_controls), run in itertools.groupby(pairs, kind):
            tokens = [token for token, _ in run]
            if are_controls:
                yield "".join(controls[token].content for token in tokens), in_loss
            else:
                yield self.tokenizer.decode(tokens), in_loss

    def _render(
        self,
        messages: Sequence[Message],
        prompt: bool = False,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> Rendering:
        """Renders a conversation, with its generation prompt if `prompt`; else it must end with a
        turn of the assistant.
        """
        (messages, more), marks = self._mask_controls((messages, more))
        # Each of the assistant's turns lies between the text before it and the text with it.
        jobs = []
        for index in _answers(messages):
            jobs.append((messages[:index], True))
            jobs.append((messages[: index + 1], False))
        turn_jobs = len(jobs)
        if prompt:
            jobs.append((messages, True))
        texts = self.template.render(jobs, more)
        text = texts[-1]
        end = 0
        turns: list[tuple[int, int]] = []
        for before, after in itertools.batched(texts[:turn_jobs], 2):
            if text.startswith(after) and after.startswith(before) and len(before) >= end:
                end = len(after)
                turns.append((len(before), end))
        if not prompt and (not turns or end < len(text)):
            raise UserError(
                "The chat template begins the assistant's turn otherwise "
                "than it writes one that is complete, "
                "so training would not match the prompts of inference: give another template."
            )
        return Rendering(text, turns, marks)

    def _example(self, rendering: Rendering, in_loss: Sequence[bool], where: str) -> Example:
        """Makes an example; `in_loss` says of each of the assistant's turns whether it is in the loss."""
        pieces = self._pieces(rendering)
        masks = [np.zeros(len(piece), bool) for piece in pieces]
        for turn, mask, is_in_loss in zip(pieces[1::2], masks[1::2], in_loss):
            mask[: self._answer_length(turn)] = is_in_loss
        return Example(np.concatenate(pieces), np.concatenate(masks), where)

    def _answer_length(self, tokens: np.ndarray) -> int:
        """Counts the tokens of a turn up to the control token that ends it, behind which the
        template may write a line end, or another that ends the text.
        """
        length = len(tokens)
        for at, token in reversed([*enumerate(tokens.tolist())]):
            if token in self.tokenizer.controls:
                length = at + 1
            elif self.tokenizer.decode([token]).strip():
                break
        return length

    def _pieces(self, rendering: Rendering) -> list[np.ndarray]:
        """Returns the tokens before, in, and after each turn of the assistant: 2 len(turns) + 1 pieces."""
        text = rendering.text
        original = str.maketrans(rendering.marks)
        cuts = [0, *itertools.chain(*rendering.turns), len(text)]
        pieces: list[np.ndarray] = []
        continued = False  # whether the text before ended in plain text
        for start, stop in itertools.pairwise(cuts):
            parts = []
            # `split` gives plain text and control tokens alternately.
            for number, part in enumerate(self._controls.split(text[start:stop])):
                if number % 2 == 1:
                    ids = np.array([self._ids[self._name(part)]], np.int32)
                    continued = False
                else:
                    ids = self.tokenizer.encode(part.translate(original), continued)
                    continued |= len(ids) > 0
                parts.append(ids)
            pieces.append(np.concatenate(parts))
        return pieces

    def _name(self, match: str) -> str:
        if match in self._ids:
            return match
        return match.strip()

    def _mask_controls(self, values: Any) -> tuple[Any, dict[str, str]]:
        """Replaces one character of every control token in a text of the values, whole or cut off
        by its edge, by one of private use.

        So the template, which handles the text as any other, makes no control token of it. Returns
        the values, and the character that each mark stands for, which is put back once the template
        is rendered.
        """
        known_text = self.source + json.dumps(values, ensure_ascii=False, default=dict)
        unused = (mark for mark in map(chr, PRIVATE) if mark not in known_text)
        marks: dict[str, str] = {}  # character -> the mark in its place

        def mark_of(character: str) -> str:
            if character not in marks:
                marks[character] = next(unused)
            return marks[character]

        def mask(value: Any, name: str = "") -> Any:
            if isinstance(value, Mapping):
                return {mask(key): mask(inner, key) for key, inner in value.items()}
            if isinstance(value, list | tuple):
                return [mask(inner) for inner in value]
            if not isinstance(value, str):
                return value
            if name in COMPARED and value.isidentifier():
                return value
            characters = list(value)
            for at in {*self._places(value)}:
                characters[at] = mark_of(characters[at])
            return "".join(characters)

        return mask(values), {mark: original for original, mark in marks.items()}

    def _places(self, text: str) -> Iterator[int]:
        """Yields where to break a control token, or a part that text before or after could complete
        to one.
        """
        match = self._controls.search(text)
        while match:
            at = match.start() + match[0].index(self._name(match[0]))
            yield at
            match = self._controls.search(text, at + 1)  # another may begin inside it
        first = len(text) - len(text.lstrip())
        last = len(text.rstrip())
        longest = max(map(len, self._ids), default=0)
        for size in range(1, min(longest, last - first + 1)):
            if text[first : first + size] in self._endings:
                yield first
            if text[last - size : last] in self._beginnings:
                yield last - size
        if 0 < last - first < longest and any(text[first:last] in name for name in self._ids):
            yield first


def _answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def choose_template(tokenizer: Tokenizer, source: str | None = None) -> tuple[str, str]:
    """Returns (template, its name): the text `source`, else the tokenizer's own, else ChatML or a
    plain one.
    """
    if source is not None:
        return source, "the template given"
    own = tokenizer.config.get("chat_template")
    if own:
        return own, "the model's own template"
    if {"<|im_start|>", "<|im_end|>"} <= {added.content for added in tokenizer.controls.values()}:
        return CHATML, "ChatML"
    return PLAIN, "a plain template (User:, Assistant:), as the model brings none"


def _pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Returns the pattern of control tokens, the longest first, with the white space that some take
    in, as one group.

    Its time is linear in a run of white space: it looks at one from its beginning alone.
    """
    patterns = []
    for added in sorted(tokenizer.controls.values(), key=lambda added: -len(added.content)):
        pattern = re.escape(added.content)
        if added.lstrip:
            pattern = rf"(?:(?<!\s)\s++)?{pattern}"
        if added.rstrip:
            pattern = rf"{pattern}\s*"
        patterns.append(pattern)
    if not patterns:
        patterns = ["(?!)"]  # which matches nothing
    return re.compile(f"({'|'.join(patterns)})")
