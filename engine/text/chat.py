"""Conversations as tokens: by a chat template, with what the model is to say marked, and users' text kept as text."""

import itertools
import re
from collections.abc import Iterator, Sequence
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

    `source` is the template, by default the tokenizer's own (`chat_template` in its config), else CHATML or PLAIN by what
    control tokens there are; `template_name` says which. `end` is the control token that closes the assistant's
    turns, None when the template closes them with none. `now` is what the template is told of the time.

    How text becomes tokens: a template's control tokens become their ids, and everything between two of them is encoded
    as plain text. Where an assistant's turn begins and ends, text is also cut, so that the tokens before an answer are
    the same whether the answer is to be learnt or yet to be made. A control token that is written in a message is text
    like any other: it is encoded as its letters.

    Raises UserError when the template cannot be compiled or run.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, now: str = FIXED_DAY) -> None:
        self.tokenizer = tokenizer
        self.source, self.template_name = choose_template(tokenizer, source)
        self._ids = {added.content: token for token, added in tokenizer.controls.items()}
        self._controls = _pattern(tokenizer)
        self._beginnings = {name[:size] for name in self._ids for size in range(1, len(name))}
        self._endings = {name[-size:] for name in self._ids for size in range(1, len(name))}
        self._longest = max(map(len, self._ids), default=0)
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

        Raises UserError for messages that are not checked (`check_messages`), and as `Template.render`.
        """
        check_messages(messages)
        text, turns, marks = self._render(messages, prompt=True)
        return np.concatenate(self._pieces(text, turns, marks))

    def examples(self, messages: Sequence[Message], where: str = "") -> list[Example]:
        """Returns the training examples in messages: the assistant's turns, each with the token that ends it.

        Usually one example in which every turn of the assistant counts. Where the template writes a turn otherwise once
        it is history (it may leave out what was thought), each turn is an example of its own, as the model meets it.
        Messages after the last turn of the assistant are left out. Raises Refusal when there is no such turn or nothing
        before it, UserError when the template begins the assistant's turn otherwise than it writes it, and as `prompt`.
        """
        check_messages(messages)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or answers[0] == 0:
            raise Refusal("there is no turn of the assistant" if not answers else "it begins with the assistant's turn")
        text, turns, marks = self._render(messages[: answers[-1] + 1], prompt=False)
        if len(turns) == len(answers):
            return [self._example(text, turns, marks, range(len(turns)), where)]
        renderings = [self._render(messages[: last + 1], prompt=False) for last in answers]
        return [self._example(text, turns, marks, [len(turns) - 1], where) for text, turns, marks in renderings]

    def answer(self, messages: Sequence[Message], where: str = "") -> Example:
        """Returns messages that end with the assistant's turn as an example in which it alone counts. Raises as `examples`."""
        check_messages(messages)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise Refusal("it does not end with an answer of the assistant to something")
        text, turns, marks = self._render(messages, prompt=False)
        return self._example(text, turns, marks, [len(turns) - 1], where)

    def marked_pieces(self, example: Example) -> Iterator[tuple[str, bool]]:
        """Yields the example for a person to read: pieces of text, control tokens by their names, and whether each counts."""
        start = 0
        for end in range(1, len(example.tokens) + 1):
            if end < len(example.tokens) and example.mask[end] == example.mask[start]:
                continue
            parts: list[str] = []
            plain: list[int] = []
            for token in example.tokens[start:end].tolist():
                if token in self.tokenizer.controls:
                    parts += [self.tokenizer.decode(plain), self.tokenizer.controls[token].content]
                    plain = []
                else:
                    plain.append(token)
            yield "".join([*parts, self.tokenizer.decode(plain)]), bool(example.mask[start])
            start = end

    def _render(self, messages: Sequence[Message], prompt: bool) -> tuple[str, list[tuple[int, int]], dict[str, str]]:
        """Returns the text, the (start, stop) of the assistant's turns in it, and which characters stand for others."""
        messages, marks = self._mask_controls(messages)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        jobs = [job for index in answers for job in ((messages[:index], True), (messages[: index + 1], False))]
        texts = self.template.render_all([*jobs, (messages, True)] if prompt else jobs)
        text = texts[-1]
        turns: list[tuple[int, int]] = []
        for before, after in zip(texts[: len(jobs) : 2], texts[1 : len(jobs) : 2]):
            if text.startswith(after) and after.startswith(before) and len(before) >= (turns[-1][1] if turns else 0):
                turns.append((len(before), len(after)))
        if not prompt and (not turns or turns[-1][1] < len(text)):
            raise UserError(
                "The chat template begins the assistant's turn otherwise than it writes one that is complete, so what is "
                "learnt would not be what is asked for later: give another with --template."
            )
        return text, turns, marks

    def _example(
        self, text: str, turns: list[tuple[int, int]], marks: dict[str, str], counted: Sequence[int], where: str
    ) -> Example:
        pieces = self._pieces(text, turns, marks)
        mask = [np.zeros(len(piece), bool) for piece in pieces]
        for index in counted:
            turn = pieces[2 * index + 1]
            mask[2 * index + 1][: self._answer_length(turn)] = True
        return Example(np.concatenate(pieces), np.concatenate(mask), where)

    def _answer_length(self, tokens: np.ndarray) -> int:
        """Returns how many of a turn's tokens the model is to say: up to the control token that ends it.

        A template may write a line end after that, or a second control token that ends the whole text.
        """
        length = len(tokens)
        for at in range(len(tokens) - 1, -1, -1):
            if int(tokens[at]) in self.tokenizer.controls:
                length = at + 1
            elif self.tokenizer.decode(tokens[at : at + 1]).strip():
                break
        return length

    def _pieces(self, text: str, turns: list[tuple[int, int]], marks: dict[str, str]) -> list[np.ndarray]:
        """Returns the tokens before, in, and after each turn of the assistant: 2 len(turns) + 1 pieces."""
        edges = [0, *(edge for turn in turns for edge in turn), len(text)]
        pieces: list[np.ndarray] = []
        plain = False  # whether what came before ended within plain text
        for start, stop in itertools.pairwise(edges):
            pieces.append(self._encode(text[start:stop], marks, plain))
            if len(pieces[-1]):
                plain = int(pieces[-1][-1]) not in self.tokenizer.controls
        return pieces

    def _encode(self, text: str, marks: dict[str, str], continued: bool) -> np.ndarray:
        """Encodes a template's text: control tokens as ids, the rest as plain text, marked characters as they were."""
        parts: list[np.ndarray] = []
        original = str.maketrans(marks)
        at = 0
        for match in self._controls.finditer(text) if self._ids else ():
            between = self.tokenizer.encode(text[at : match.start()].translate(original), continued)
            parts += [between, np.array([self._id(match)], np.int32)]
            at, continued = match.end(), False
        parts.append(self.tokenizer.encode(text[at:].translate(original), continued))
        return np.concatenate(parts)

    def _id(self, match: re.Match[str]) -> int:
        name = match[0]
        return self._ids[name] if name in self._ids else self._ids[name.strip()]

    def _mask_controls(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Returns messages in which no control token can be read, and what the characters put into them stand for.

        One character of every control token written in a message, whole or cut off by its edge, is exchanged for one of
        private use. The template then handles the text as it would any other (trims it, looks into it), and afterwards
        the character is put back into what is by then known to be plain text.
        """
        contents = [message["content"] for message in messages]
        unused = (chr(code) for code in PRIVATE if not any(chr(code) in text for text in [*contents, self.source]))
        stand_in: dict[str, str] = {}
        marked = []
        for message in messages:
            content = message["content"]
            text = list(content)
            for at in self._places(content):
                if content[at] not in stand_in:
                    stand_in[content[at]] = next(unused)
                text[at] = stand_in[content[at]]
            marked.append({**message, "content": "".join(text)})
        return marked, {put: original for original, put in stand_in.items()}

    def _places(self, text: str) -> Iterator[int]:
        """Yields where to break what is, or could with text before or after it become, a control token."""
        at = 0
        while match := self._controls.search(text, at) if self._ids else None:
            name = match[0] if match[0] in self._ids else match[0].strip()
            at = match.start() + match[0].index(name)
            yield at
            at += 1  # another may begin inside it
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        for size in range(1, min(self._longest, last - first + 1)):
            if text[first : first + size] in self._endings:
                yield first
            if text[last - size : last] in self._beginnings:
                yield last - size
        if 0 < last - first < self._longest and any(text[first:last] in name for name in self._ids):
            yield first


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
        named = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}
        own = named.get("default")
    if isinstance(own, str) and own:
        return own, "the model's own template"
    controls = {added.content for added in tokenizer.controls.values()}
    if {"<|im_start|>", "<|im_end|>"} <= controls:
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
    """Returns what finds control tokens, the longest first, with the white space that some of them take in.

    A run of white space is looked at from its beginning alone: from every place in it, a long one would take for ever.
    """
    names = sorted(tokenizer.controls.values(), key=lambda added: -len(added.content))
    before = r"(?:(?<!\s)\s++)?"
    return re.compile("|".join(before * added.lstrip + re.escape(added.content) + r"\s*" * added.rstrip for added in names))
