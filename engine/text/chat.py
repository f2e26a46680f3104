"""Conversations as tokens: by a chat template, with what the model is to say marked, and users' text kept as text."""

import itertools
import re
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.text.template import FIXED_DAY, Message, Refusal, Template
from engine.text.tokenizer import Tokenizer

# For a model that has these control tokens and no template of its own (the format of Qwen and SmolLM).
CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# For a model without control tokens for roles, such as one trained here from nothing: names and line ends, as in a play.
# Only the end of an answer is a control token, so this keeps a user from ending the answer but not from writing a role.
PLAIN = """{% for message in messages %}
{%- if message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token + '\\n' }}
{%- elif message.role == 'system' %}{{ message.content + '\\n' }}
{%- else %}{{ message.role.capitalize() + ': ' + message.content + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

ROLES = ("system", "user", "assistant", "tool")
PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode's private use: no character of any text


class Example(NamedTuple):
    """A text to learn: its tokens, and which of them count as targets."""

    tokens: np.ndarray  # (T,) int32
    mask: np.ndarray  # (T,) bool: True where the model is to say this token
    where: str  # file:line


class Chat:
    """Turns conversations into the tokens that a model reads and should write, by a tokenizer and a chat template.

    `source` is the template (see `choose_template`), `template_name` says which it is, and `now` is the time it is told.
    `end` is the control token that closes the assistant's turns, None when the template closes them with none.

    A template's control tokens become their ids, and everything between two of them is encoded as plain text. Text is
    also cut where an assistant's turn begins and ends, so that the tokens before an answer are the same whether it is to
    be learnt or yet to be made. A control token written in a message is text like any other: it is encoded as its letters.

    Raises UserError when the template cannot be compiled or run.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, now: str = FIXED_DAY) -> None:
        self.tokenizer = tokenizer
        self.source, self.template_name = choose_template(tokenizer, source)
        self._ids = {added.content: token for token, added in tokenizer.controls.items()}
        self._controls = _pattern(tokenizer)
        self._beginnings = {name[:size] for name in self._ids for size in range(1, len(name))}
        self._endings = {name[-size:] for name in self._ids for size in range(1, len(name))}
        self.template = Template(self.source, _special_names(tokenizer), now)
        probe = self.examples([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[0]
        answer = probe.tokens[probe.mask]
        if not len(answer):
            raise UserError("The chat template writes nothing of what the assistant says: give another with --template.")
        last = int(answer[-1])
        self.end = last if last in tokenizer.controls else None

    def close(self) -> None:
        """Ends the template's process; the next use starts another."""
        self.template.close()

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Returns messages as tokens (T,) int32: the conversation so far and the beginning of the assistant's turn.

        Raises UserError as `check_messages` and `Template.render`.
        """
        check_messages(messages)
        return np.concatenate(self._pieces(*self._render(messages, prompt=True)))

    def examples(self, messages: Sequence[Message], where: str = "") -> list[Example]:
        """Returns the training examples in messages: the assistant's turns, each with the token that ends it.

        Usually one example in which every turn of the assistant counts. Where the template writes a turn otherwise once
        it is history (it may leave out what was thought), each turn is an example of its own, as the model meets it.
        Messages after the last turn of the assistant are left out. Raises Refusal when there is no such turn or nothing
        before it, UserError when the template begins the assistant's turn otherwise than it writes it, and as `prompt`.
        """
        check_messages(messages)
        answers = _answers(messages)
        if not answers or answers[0] == 0:
            raise Refusal("there is no turn of the assistant" if not answers else "it begins with the assistant's turn")
        text, turns, marks = self._render(messages[: answers[-1] + 1])
        if len(turns) == len(answers):
            return [self._example(text, turns, marks, 0, where)]
        return [self._example(*self._render(messages[: last + 1]), -1, where) for last in answers]

    def answer(self, messages: Sequence[Message], where: str = "") -> Example:
        """Returns messages that end with the assistant's turn as an example in which it alone counts. Raises as `examples`."""
        check_messages(messages)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise Refusal("it does not end with an answer of the assistant to something")
        return self._example(*self._render(messages), -1, where)

    def marked_pieces(self, example: Example) -> Iterator[tuple[str, bool]]:
        """Yields the example for a person to read: pieces of text, control tokens by their names, and whether each counts."""
        controls, decode = self.tokenizer.controls, self.tokenizer.decode
        for counts, piece in itertools.groupby(zip(example.tokens.tolist(), example.mask.tolist()), itemgetter(1)):
            text = ""
            for named, run in itertools.groupby((token for token, _ in piece), controls.__contains__):
                tokens = [*run]
                text += "".join(controls[token].content for token in tokens) if named else decode(tokens)
            yield text, counts

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]], dict[str, str]]:
        """Returns the text, the (start, stop) of the assistant's turns in it, and which characters stand for others."""
        messages, marks = self._mask_controls(messages)
        jobs = [job for index in _answers(messages) for job in ((messages[:index], True), (messages[: index + 1], False))]
        texts = self.template.render_all([*jobs, (messages, True)] if prompt else jobs)
        text, end = texts[-1], 0
        turns: list[tuple[int, int]] = []
        for before, after in itertools.batched(texts[: len(jobs)], 2):
            if text.startswith(after) and after.startswith(before) and len(before) >= end:
                end = len(after)
                turns.append((len(before), end))
        if not prompt and (not turns or end < len(text)):
            raise UserError(
                "The chat template begins the assistant's turn otherwise than it writes one that is complete, so what is "
                "learnt would not be what is asked for later: give another with --template."
            )
        return text, turns, marks

    def _example(self, text: str, turns: list[tuple[int, int]], marks: dict[str, str], first: int, where: str) -> Example:
        """Returns the example in which the turns from number `first` on count."""
        pieces = self._pieces(text, turns, marks)
        masks = [np.zeros(len(piece), bool) for piece in pieces]
        for turn, mask in [*zip(pieces, masks)][1::2][first:]:
            mask[: self._answer_length(turn)] = True
        return Example(np.concatenate(pieces), np.concatenate(masks), where)

    def _answer_length(self, tokens: np.ndarray) -> int:
        """Returns how many of a turn's tokens the model is to say: up to the control token that ends it.

        A template may write a line end after that, or a second control token that ends the whole text.
        """
        length = len(tokens)
        for at, token in reversed([*enumerate(tokens.tolist())]):
            if token in self.tokenizer.controls:
                length = at + 1
            elif self.tokenizer.decode([token]).strip():
                break
        return length

    def _pieces(self, text: str, turns: list[tuple[int, int]], marks: dict[str, str]) -> list[np.ndarray]:
        """Returns the tokens before, in, and after each turn of the assistant: 2 len(turns) + 1 pieces.

        Control tokens become ids, the rest is encoded as plain text, with the marked characters as they were.
        """
        original = str.maketrans(marks)
        pieces: list[np.ndarray] = []
        continued = False  # whether what came before ended within plain text
        for start, stop in itertools.pairwise([0, *itertools.chain(*turns), len(text)]):
            parts = []
            for number, part in enumerate(self._controls.split(text[start:stop])):
                named = number % 2 == 1
                plain = part.translate(original)
                ids = np.array([self._ids[self._name(part)]], np.int32) if named else self.tokenizer.encode(plain, continued)
                continued = not named if len(ids) else continued
                parts.append(ids)
            pieces.append(np.concatenate(parts))
        return pieces

    def _name(self, match: str) -> str:
        return match if match in self._ids else match.strip()

    def _mask_controls(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Returns messages in which no control token can be read, and what the characters put into them stand for.

        One character of every control token written in a message, whole or cut off by its edge, is exchanged for one of
        private use. The template then handles the text as it would any other (trims it, looks into it), and afterwards
        the character is put back into what is by then known to be plain text.
        """
        texts = [self.source, *(message["content"] for message in messages)]
        unused = (mark for mark in map(chr, PRIVATE) if not any(mark in text for text in texts))
        stand_ins: dict[str, str] = {}
        marked = []
        for message in messages:
            text = list(message["content"])
            for at in {*self._places(message["content"])}:
                if text[at] not in stand_ins:
                    stand_ins[text[at]] = next(unused)
                text[at] = stand_ins[text[at]]
            marked.append({**message, "content": "".join(text)})
        return marked, {put: original for original, put in stand_ins.items()}

    def _places(self, text: str) -> Iterator[int]:
        """Yields where to break what is, or could with text before or after it become, a control token."""
        at = 0
        while match := self._controls.search(text, at):
            at = match.start() + match[0].index(self._name(match[0]))
            yield at
            at += 1  # another may begin inside it
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
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


def check_messages(messages: Sequence[Message]) -> None:
    """Raises UserError unless there are messages and each has a role of ROLES and a text for content."""
    if not messages:
        raise UserError("there are no messages")
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {number} has the role {role!r}; wanted one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {number} has no text as its content")


def choose_template(tokenizer: Tokenizer, source: str | None = None) -> tuple[str, str]:
    """Returns (template, its name): `source`, else the tokenizer's own, else one of ours that it has the tokens for."""
    if source is not None:
        return source, "the template given"
    own = tokenizer.config.get("chat_template")
    if isinstance(own, list):  # several by name, as Hugging Face's files may have them
        own = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}.get("default")
    if isinstance(own, str) and own:
        return own, "the model's own template"
    if {"<|im_start|>", "<|im_end|>"} <= {added.content for added in tokenizer.controls.values()}:
        return CHATML, "ChatML"
    return PLAIN, "a plain template (User:, Assistant:), as the model brings none"


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns bos_token, eos_token and the like of a tokenizer_config.json, as text."""
    end = tokenizer.controls.get(tokenizer.end)
    names = {"eos_token": end.content} if end else {}
    for name, value in tokenizer.config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            names[name] = value
    return names


def _pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Returns what finds control tokens, the longest first, with the white space that some of them take in, as one group.

    A run of white space is looked at from its beginning alone: from every place in it, a long one would take for ever.
    """
    names = sorted(tokenizer.controls.values(), key=lambda added: -len(added.content))
    before = r"(?:(?<!\s)\s++)?"
    any_name = "|".join(before * added.lstrip + re.escape(added.content) + r"\s*" * added.rstrip for added in names)
    return re.compile(f"({any_name or '(?!)'})")  # (?!) is found nowhere
