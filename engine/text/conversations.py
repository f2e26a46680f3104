"""Fine-tuning data from files: conversations in any of the usual forms, plain text, and pairs of answers to prefer between."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError, nearest
from engine.text.chat import ROLES
from engine.text.jsonl import decode_utf8, json_type, read_rows
from engine.text.template import Message

VOICE = Path(__file__).with_name("voice")
NAMED = {
    "voice": VOICE / "train.jsonl",
    "voice-held-out": VOICE / "held_out.jsonl",
    "voice-preferences": VOICE / "preferences.jsonl",
}

# What a row of each kind must hold, in the order in which a row that fits several is decided.
KINDS = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
FORMS = (
    'a .jsonl file (or .json, an array) of {"messages": [...]}, {"prompt", "completion"}, {"instruction", "input", "output"}, '
    '{"conversations": [...]}, {"prompt", "chosen", "rejected"} or {"text"}, or a .txt or .md file'
)


class Conversation(NamedTuple):
    """Messages in order, and the line they are from."""

    messages: tuple[Message, ...]
    where: str  # file:line


class Text(NamedTuple):
    """A text to train on, all of it."""

    text: str
    where: str


class Preference(NamedTuple):
    """A prompt and two answers of the assistant, the first of which is to be preferred."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str


@dataclasses.dataclass(frozen=True)
class Conversations:
    """A data set that can be read again and again, all of one `kind` of KINDS.

    Iterating raises UserError, with file and line, at the first row that cannot be understood or is of another kind.
    """

    name: str
    kind: str
    read: Callable[[], Iterator[Conversation | Text | Preference]]

    def __iter__(self) -> Iterator[Conversation | Text | Preference]:
        return self.read()


def read_conversations(source: Path | str) -> Conversations:
    """Opens the data set in a file, or one that is shipped by its name (`voice`, `voice-held-out`, `voice-preferences`).

    Raises UserError when there is none, its first row is of no known kind, or its bytes are no text.
    """
    path = NAMED.get(str(source)) or Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; wanted {FORMS}, or one of {', '.join(NAMED)}.{nearest(str(source), [*NAMED])}")
    if path.suffix.lower() in (".txt", ".md"):
        return Conversations(str(source), "text", lambda: iter([Text(decode_utf8(path.read_bytes(), path), str(path))]))
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise UserError(f"{path} is of a kind that cannot be read ({path.suffix or 'no suffix'}); wanted {FORMS}.")
    first = next(read_rows(path), None)
    if first is None:
        raise UserError(f"{path} is empty; wanted {FORMS}.")
    return Conversations(str(source), _kind(*first), lambda: _read(path))


def _read(path: Path) -> Iterator[Conversation | Text | Preference]:
    kind, begun = "", ""
    for row, where in read_rows(path):
        this = _kind(row, where)
        if kind not in ("", this):
            raise UserError(f"{where} is of the kind {this}, and {begun} was {kind}; keep each kind in a file of its own.")
        for name in KINDS[this]:
            if row.get(name) is None:
                raise UserError(f"{where}: `{name}` is missing; {this} rows need {_quote_names(KINDS[this])}.")
        kind, begun = this, begun or where
        yield _parse_row(this, row, where)


def _kind(row: dict[str, Any], where: str) -> str:
    for fits in (all, any):  # a row that has some of a kind's names lacks the others
        for kind, names in KINDS.items():
            if fits(name in row for name in names):
                return kind
    names_there = _quote_names(list(row)[:8]) or "nothing"
    raise UserError(f"{where} has {names_there}, by which no kind of data is known; wanted {FORMS}.")


def _parse_row(kind: str, row: dict[str, Any], where: str) -> Conversation | Text | Preference:
    if kind == "text":
        return Text(_text(row["text"], "text", where), where)
    if kind == "preference":
        return _parse_preference(row, where)
    if kind in ("messages", "ShareGPT"):
        name = KINDS[kind][0]
        return Conversation(_messages(row[name], name, where, share_gpt=kind == "ShareGPT"), where)
    if kind == "Alpaca":
        instruction, more = _text(row["instruction"], "instruction", where), _text(row.get("input") or "", "input", where)
        system = [{"role": "system", "content": _text(row["system"], "system", where)}] if row.get("system") else []
        user = {"role": "user", "content": f"{instruction}\n\n{more}" if more.strip() else instruction}
        prompt: tuple[Message, ...] = (*system, user)
        answer = _text(row["output"], "output", where)
    else:
        prompt, answer = _prompt(row["prompt"], "prompt", where), _answer(row["completion"], "completion", where)[1]
    return Conversation((*prompt, {"role": "assistant", "content": answer}), where)


def _parse_preference(row: dict[str, Any], where: str) -> Preference:
    """Reads a preference: answers are text or messages, which may repeat the prompt; it then need not stand by itself."""
    before, chosen = _answer(row["chosen"], "chosen", where)
    other, rejected = _answer(row["rejected"], "rejected", where)
    if before != other:
        raise UserError(f"{where}: `chosen` and `rejected` answer different prompts.")
    name = "messages" if row.get("prompt") is None else "prompt"
    if row.get(name) is not None:
        prompt = _prompt(row[name], name, where)
        before = prompt if before in ((), prompt[-len(before) :]) else before
    elif not before:
        raise UserError(f"{where}: `prompt` is missing, the text or messages that both answers are for.")
    return Preference(before, chosen, rejected, where)


def _answer(value: Any, name: str, where: str) -> tuple[tuple[Message, ...], str]:
    """Returns (the messages before, the text) of an answer given as text, as a message, or as messages that end with it."""
    if isinstance(value, str):
        return (), _text(value, name, where)
    messages = _messages([value] if isinstance(value, dict) else value, name, where)
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: `{name}` does not end with the assistant's answer.")
    return messages[:-1], messages[-1]["content"]


def _prompt(value: Any, name: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "user", "content": _text(value, name, where)},)
    return _messages(value, name, where)


def _messages(value: Any, name: str, where: str, share_gpt: bool = False) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: `{name}` should be a list of messages, not {json_type(value)}.")
    share_gpt = share_gpt and any(isinstance(message, dict) and "from" in message for message in value)
    role, content = ("from", "value") if share_gpt else ("role", "content")
    messages = []
    for number, message in enumerate(value, 1):
        at = f"{where}: message {number} of `{name}`"
        if not isinstance(message, dict):
            raise UserError(f"{at} should be an object with `{role}` and `{content}`, not {json_type(message)}.")
        for key in (role, content):
            if message.get(key) is None:
                raise UserError(f"{at} has no `{key}`.")
        speaker = message[role] if message[role] in ROLES else SPEAKERS.get(str(message[role]).lower())
        if speaker is None:
            known = [*SPEAKERS] if share_gpt else [*ROLES]
            hint = nearest(str(message[role]), known)
            raise UserError(f"{at} has the {role} {message[role]!r}; wanted one of {', '.join(known)}.{hint}")
        text = message[content]
        if isinstance(text, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
            text = "".join(part["text"] for part in text)
        messages.append({"role": speaker, "content": _text(text, content, at)})
    return tuple(messages)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{name}` should be text, not {json_type(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: `{name}` has half a character (a lone surrogate).") from None
    return value


def _quote_names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
