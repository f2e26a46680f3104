"""Reads fine-tuning data: conversations in the usual forms, plain text, and preferences of two answers."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError, did_you_mean
from engine.files import decode_utf8
from engine.text.chat_tokenizer import ROLES
from engine.text.corpus import Corpus
from engine.text.rows import check_text, json_type, read_rows
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
    **{role: role for role in ROLES},
    "human": "user",
    "observation": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
}


class MessageKeys(NamedTuple):
    """The fields of a message in a file, and the names there of those who speak."""

    role: str
    content: str
    speakers: list[str]


OPENAI_KEYS = MessageKeys("role", "content", [*ROLES])
SHARE_GPT_KEYS = MessageKeys("from", "value", [*SPEAKERS])
FORMS = (
    'a .jsonl file (or .json, an array) of {"messages": [...]}, {"prompt", "completion"}, '
    '{"instruction", "input", "output"}, '
    '{"conversations": [...]}, {"prompt", "chosen", "rejected"} or {"text"}, or a .txt or .md file'
)


class Conversation(NamedTuple):
    """A row's messages, in order, and what is to be trained on of them."""

    messages: tuple[Message, ...]
    where: str  # file:line
    context: frozenset[int] = frozenset()  # the assistant's messages that are not trained on, by index
    weight: float = 1.0  # of the loss
    label: bool | None = None  # whether the answer at the end is a good one, where the row says so
    rejected: str | None = None  # an answer to which the one at the end is preferred

    @property
    def text(self) -> str:
        """All messages; of an answer with a label, or that is preferred, the prompt, which others
        may have too.
        """
        if self.label is None and self.rejected is None:
            messages = self.messages
        else:
            messages = self.messages[:-1]
        return "\n".join(message["content"] for message in messages)


class Text(NamedTuple):
    """A plain text, all of which is trained on."""

    text: str
    where: str  # file:line, or a whole file
    weight: float = 1.0  # of the loss


# Fields that say what to train on and cannot be granted here, and why: training without them would
# be on something else.
UNSUPPORTED = {
    **dict.fromkeys(
        ("tools", "tool_calls", "functions", "function_call"), "the model is given no tools here"
    ),
    **dict.fromkeys(
        ("reasoning_content", "refusal", "history"), "it would not be read; write it into the messages"
    ),
    "mask": 'the masks are written as "weight": 0 at a message here',
}
MAX_WEIGHT = 1e6

Record = Conversation | Text
Conversations = Corpus[Record]  # all of one `kind` of KINDS


def read_conversations(source: Path | str) -> Conversations:
    """Opens the data set in a file, or one that is shipped by its name (`voice`, `voice-held-out`,
    `voice-preferences`).

    Raises UserError when there is none, its first row is of no known kind, or its bytes are no
    text.
    """
    name = str(source)
    path = SHIPPED.get(name) or Path(source).expanduser()
    if not path.is_file():
        if path.is_dir():
            problem = (
                "is a folder, and one file is read: join its texts into a .txt, or its rows into a .jsonl"
            )
        elif path.exists():
            problem = "is not a file"
        else:
            problem = "does not exist"
        raise UserError(
            f"{path} {problem}; wanted {FORMS}, "
            f"or one of {', '.join(SHIPPED)}.{did_you_mean(name, [*SHIPPED])}"
        )
    if path.suffix.lower() in (".txt", ".md"):
        return Conversations(name, functools.partial(_read_whole, path))
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise UserError(
            f"{path} is of a kind that cannot be read ({path.suffix or 'no suffix'}); wanted {FORMS}."
        )
    first = next(read_rows(path), None)
    if first is None:
        raise UserError(f"{path} is empty; wanted {FORMS}.")
    first_row, where = first
    kind = _kind(first_row, where)
    return Conversations(name, functools.partial(_read, path, kind, where), kind)


def _read_whole(path: Path) -> Iterator[Record]:
    yield Text(decode_utf8(path.read_bytes(), path), str(path))


def _read(path: Path, kind: str, where_first: str) -> Iterator[Record]:
    """Yields the records of a file of rows, which are all of one kind, that of the first."""
    for row, where in read_rows(path):
        own_kind = _kind(row, where)
        if own_kind != kind:
            raise UserError(
                f"{where} is of the kind {own_kind}, and {where_first} was {kind}; "
                "keep each kind in a file of its own."
            )
        for name in KINDS[kind]:
            if row.get(name) is None:
                raise UserError(
                    f"{where}: `{name}` is missing; {kind} rows need {_quote_names(KINDS[kind])}."
                )
        yield _parse_row(kind, row, where)


def _kind(row: dict[str, Any], where: str) -> str:
    """Returns the kind of a row: the first whose fields it has, or else of which it has one."""
    for kind, names in KINDS.items():
        if all(name in row for name in names):
            return kind
    for kind, names in KINDS.items():
        if any(name in row for name in names):
            return kind
    names_there = _quote_names(list(row)[:8]) or "nothing"
    raise UserError(f"{where} has {names_there}, by which no kind of data is known; wanted {FORMS}.")


def _parse_row(kind: str, row: dict[str, Any], where: str) -> Record:
    weight = _row_weight(kind, row, where)
    if kind == "text":
        return Text(check_text(row["text"], "text", where), where, weight)
    _refuse_unsupported({name: row.get(name) for name in ("tools", "functions", "history", "mask")}, where)
    system = check_text(row.get("system") or "", "system", where)
    if kind in ("messages", "ShareGPT"):
        name = KINDS[kind][0]
        messages, context = _messages(row[name], name, where)
        conversation = Conversation(messages, where, context, weight)
    elif kind == "preference":
        messages, rejected = _parse_preference(row, where)
        conversation = Conversation(messages, where, weight=weight, rejected=rejected)
    elif kind == "Alpaca":
        conversation = Conversation(_parse_alpaca(row, where), where, weight=weight)
    else:
        conversation = _parse_completion(row, where, weight)
    if system:
        return _begin_with_system(conversation, system)
    return conversation


def _parse_alpaca(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    instruction = check_text(row["instruction"], "instruction", where)
    answer = check_text(row["output"], "output", where)
    more = check_text(row.get("input") or "", "input", where)
    if more.strip():
        instruction = f"{instruction}\n\n{more}"
    return ({"role": "user", "content": instruction}, assistant_message(answer))


def _parse_completion(row: dict[str, Any], where: str, weight: float) -> Conversation:
    """Reads a prompt and its completion. The assistant's turns in the prompt are context."""
    prompt, _ = _messages(row["prompt"], "prompt", where, text_role="user")
    label = None
    if isinstance(row.get("label"), bool):
        label = row["label"]
    before, answer = _answer(row["completion"], "completion", where)
    messages = (*prompt, *before, assistant_message(answer))
    context = frozenset(index for index, message in enumerate(prompt) if message["role"] == "assistant")
    return Conversation(messages, where, context, weight, label)


def _begin_with_system(conversation: Conversation, system: str) -> Conversation:
    """Returns a conversation that begins with this system message: as it is, if it does already."""
    message = {"role": "system", "content": system}
    if conversation.messages[:1] == (message,):
        return conversation
    messages = (message, *conversation.messages)
    context = frozenset(index + 1 for index in conversation.context)
    return conversation._replace(messages=messages, context=context)


def assistant_message(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _row_weight(kind: str, row: dict[str, Any], where: str) -> float:
    weight = row.get("weight")
    if weight is None:
        weight = 1
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        raise UserError(
            f"{where} has the `weight` {weight!r}; wanted a number from 0 (left out) to {MAX_WEIGHT:,.0f}."
        )
    if kind == "preference" and weight != 1:
        raise UserError(
            f"{where} has the `weight` {weight!r}, and preferences all weigh the same here: leave it out."
        )
    return float(weight)


def _refuse_unsupported(fields: dict[str, Any], where: str) -> None:
    for name, why in UNSUPPORTED.items():
        if fields.get(name) not in (None, "", 0, [], {}, "[]", "{}"):  # also as JSON in a text
            raise UserError(f"{where} has `{name}`, and {why}. Remove the field, or leave the row out.")


def _parse_preference(row: dict[str, Any], where: str) -> tuple[tuple[Message, ...], str]:
    """Reads two answers, texts or messages, which may hold the prompt too: (the chosen one behind
    its prompt, the other).
    """
    before, chosen = _answer(row["chosen"], "chosen", where)
    other, rejected = _answer(row["rejected"], "rejected", where)
    if before != other:
        raise UserError(f"{where}: `chosen` and `rejected` answer different prompts.")
    name = "messages" if row.get("prompt") is None else "prompt"
    if row.get(name) is not None:
        prompt, _ = _messages(row[name], name, where, text_role="user")
        if not before or prompt[-len(before) :] == before:
            before = prompt
    elif not before:
        raise UserError(f"{where}: `prompt` is missing, the text or messages that both answers are for.")
    return (*before, assistant_message(chosen)), rejected


def _answer(value: Any, name: str, where: str) -> tuple[tuple[Message, ...], str]:
    """Reads an answer, text or messages that end with it: (the messages before, its text)."""
    if isinstance(value, dict):
        value = [value]
    messages, context = _messages(value, name, where, text_role="assistant")
    if not messages or messages[-1]["role"] != "assistant" or len(messages) - 1 in context:
        raise UserError(f"{where}: `{name}` does not end with the assistant's answer, to be trained on.")
    return messages[:-1], messages[-1]["content"]


def _messages(
    value: Any, name: str, where: str, text_role: str = ""
) -> tuple[tuple[Message, ...], frozenset[int]]:
    """Reads messages, and which of the assistant's are context alone; a text is one message of
    `text_role`, if any.
    """
    if text_role and isinstance(value, str):
        return ({"role": text_role, "content": check_text(value, name, where)},), frozenset()
    if not isinstance(value, list):
        raise UserError(f"{where}: `{name}` should be a list of messages, not {json_type(value)}.")
    keys = OPENAI_KEYS
    if any(isinstance(message, dict) and "from" in message and "role" not in message for message in value):
        keys = SHARE_GPT_KEYS
    messages = []
    context = set()
    for index, fields in enumerate(value):
        at = f"{where}: message {index + 1} of `{name}`"
        message = _parse_message(fields, keys, at)
        messages.append(message)
        if _is_context(fields, message["role"], at):
            context.add(index)
    return tuple(messages), frozenset(context)


def _parse_message(fields: Any, keys: MessageKeys, at: str) -> Message:
    if not isinstance(fields, dict):
        raise UserError(
            f"{at} should be an object with `{keys.role}` and `{keys.content}`, not {json_type(fields)}."
        )
    _refuse_unsupported(fields, at)
    for key in (keys.role, keys.content):
        if fields.get(key) is None:
            raise UserError(f"{at} has no `{key}`.")
    speaker = str(fields[keys.role])
    if speaker.lower() not in SPEAKERS:
        raise UserError(
            f"{at} has the {keys.role} {speaker!r}; "
            f"wanted one of {', '.join(keys.speakers)}.{did_you_mean(speaker, keys.speakers)}"
        )
    text = _join_parts(fields[keys.content])
    return {"role": SPEAKERS[speaker.lower()], "content": check_text(text, keys.content, at)}


def _join_parts(content: Any) -> Any:
    """Returns the text of a message's content that is a list of parts of text; other content as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return content
    return "".join(part["text"] for part in content)


def _is_context(message: dict[str, Any], role: str, at: str) -> bool:
    """Whether an assistant's message is not to be trained on, by `weight` 0 (OpenAI), or `train` or
    `loss` false (others).
    """
    values = {name: message[name] for name in ("weight", "train", "loss") if message.get(name) is not None}
    for name, value in values.items():
        if value not in (0, 1):
            raise UserError(
                f"{at} has the `{name}` {value!r}; wanted 0, for context alone, or 1, to be trained on."
            )
        if value and role != "assistant":
            raise UserError(
                f"{at} has the `{name}` {value!r}, "
                "and only the assistant's messages are trained on: give it 0."
            )
    return role == "assistant" and not all(values.values())


def _quote_names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
