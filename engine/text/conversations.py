"""Reads fine-tuning data: conversations in any of the usual forms, plain text, and preferences between two answers."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError, did_you_mean
from engine.text.chat_tokenizer import ROLES
from engine.text.corpus import Corpus
from engine.text.jsonl import check_text, decode_utf8, json_type, read_rows
from engine.text.template import Message

VOICE = Path(__file__).with_name("voice")
SHIPPED = {
    "voice": VOICE / "train.jsonl",
    "voice-held-out": VOICE / "held_out.jsonl",
    "voice-preferences": VOICE / "preferences.jsonl",
}

# The fields of each kind of row; the first kind that a row fits is its own.
KINDS = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
SPEAKERS = {
    **{role: role for role in ROLES}, "human": "user", "observation": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
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
    """A plain text to train on."""

    text: str
    where: str


class Preference(NamedTuple):
    """A prompt with its chosen and its rejected answer."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str


Record = Conversation | Text | Preference
Conversations = Corpus[Record]  # all of one `kind` of KINDS


def read_conversations(source: Path | str) -> Conversations:
    """Opens the data set in a file, or one that is shipped by its name (`voice`, `voice-held-out`, `voice-preferences`).

    Raises UserError when there is none, its first row is of no known kind, or its bytes are no text.
    """
    name = str(source)
    path = SHIPPED.get(name) or Path(source).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}; wanted {FORMS}, or one of {', '.join(SHIPPED)}.{did_you_mean(name, [*SHIPPED])}")
    if path.suffix.lower() in (".txt", ".md"):
        return Conversations(name, lambda: iter([Text(decode_utf8(path.read_bytes(), path), str(path))]))
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise UserError(f"{path} is of a kind that cannot be read ({path.suffix or 'no suffix'}); wanted {FORMS}.")
    first = next(read_rows(path), None)
    if first is None:
        raise UserError(f"{path} is empty; wanted {FORMS}.")
    kind = _kind(*first)
    return Conversations(name, lambda: _read(path, kind, first[1]), kind)


def _read(path: Path, kind: str, first: str) -> Iterator[Record]:
    for row, where in read_rows(path):
        if (this := _kind(row, where)) != kind:
            raise UserError(f"{where} is of the kind {this}, and {first} was {kind}; keep each kind in a file of its own.")
        for name in KINDS[kind]:
            if row.get(name) is None:
                raise UserError(f"{where}: `{name}` is missing; {kind} rows need {_quote_names(KINDS[kind])}.")
        yield _parse_row(kind, row, where)


def _kind(row: dict[str, Any], where: str) -> str:
    for fits in (all, any):  # the second: names are missing
        for kind, names in KINDS.items():
            if fits(name in row for name in names):
                return kind
    names_there = _quote_names(list(row)[:8]) or "nothing"
    raise UserError(f"{where} has {names_there}, by which no kind of data is known; wanted {FORMS}.")


def _parse_row(kind: str, row: dict[str, Any], where: str) -> Record:
    if kind == "text":
        return Text(check_text(row["text"], "text", where), where)
    if kind == "preference":
        return _parse_preference(row, where)
    if kind in ("messages", "ShareGPT"):
        name = KINDS[kind][0]
        return Conversation(_messages(row[name], name, where), where)
    if kind == "Alpaca":
        instruction, answer = (check_text(row[name], name, where) for name in ("instruction", "output"))
        system, more = (check_text(row.get(name) or "", name, where) for name in ("system", "input"))
        user = {"role": "user", "content": f"{instruction}\n\n{more}" if more.strip() else instruction}
        prompt: tuple[Message, ...] = ({"role": "system", "content": system}, user) if system else (user,)
    else:
        prompt = _messages(row["prompt"], "prompt", where, text_role="user")
        answer = _answer(row["completion"], "completion", where)[1]
    return Conversation((*prompt, {"role": "assistant", "content": answer}), where)


def _parse_preference(row: dict[str, Any], where: str) -> Preference:
    """Reads two answers, texts or messages; messages may hold the prompt too."""
    before, chosen = _answer(row["chosen"], "chosen", where)
    other, rejected = _answer(row["rejected"], "rejected", where)
    if before != other:
        raise UserError(f"{where}: `chosen` and `rejected` answer different prompts.")
    name = "messages" if row.get("prompt") is None else "prompt"
    if row.get(name) is not None:
        prompt = _messages(row[name], name, where, text_role="user")
        before = prompt if before in ((), prompt[-len(before) :]) else before
    elif not before:
        raise UserError(f"{where}: `prompt` is missing, the text or messages that both answers are for.")
    return Preference(before, chosen, rejected, where)


def _answer(value: Any, name: str, where: str) -> tuple[tuple[Message, ...], str]:
    """Reads an answer, text or messages that end with it: (the messages before, its text)."""
    messages = _messages([value] if isinstance(value, dict) else value, name, where, text_role="assistant")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: `{name}` does not end with the assistant's answer.")
    return messages[:-1], messages[-1]["content"]


def _messages(value: Any, name: str, where: str, text_role: str = "") -> tuple[Message, ...]:
    """Reads messages; a text is one message of `text_role`, where that is given."""
    if text_role and isinstance(value, str):
        return ({"role": text_role, "content": check_text(value, name, where)},)
    if not isinstance(value, list):
        raise UserError(f"{where}: `{name}` should be a list of messages, not {json_type(value)}.")
    share_gpt = any(isinstance(message, dict) and "from" in message and "role" not in message for message in value)
    role, content = ("from", "value") if share_gpt else ("role", "content")
    messages = []
    for number, message in enumerate(value, 1):
        at = f"{where}: message {number} of `{name}`"
        if not isinstance(message, dict):
            raise UserError(f"{at} should be an object with `{role}` and `{content}`, not {json_type(message)}.")
        for key in (role, content):
            if message.get(key) is None:
                raise UserError(f"{at} has no `{key}`.")
        speaker = str(message[role])
        if speaker.lower() not in SPEAKERS:
            known = [*SPEAKERS] if share_gpt else [*ROLES]
            raise UserError(f"{at} has the {role} {speaker!r}; wanted one of {', '.join(known)}.{did_you_mean(speaker, known)}")
        text = message[content]
        if isinstance(text, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
            text = "".join(part["text"] for part in text)
        messages.append({"role": SPEAKERS[speaker.lower()], "content": check_text(text, content, at)})
    return tuple(messages)


def _quote_names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
