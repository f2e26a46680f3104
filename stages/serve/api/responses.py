"""POST /v1/responses, OpenAI's: answers a conversation sent whole, for none is remembered; counts its tokens."""

import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta
from starlette.responses import Response
from starlette.types import ASGIApp

from engine.errors import InvalidField
from engine.inference.request import SamplingParams
from stages.serve.api.fields import (
    EmptyList,
    JsonObject,
    LogProbs,
    MaxTokens,
    MessageList,
    Several,
    StrictFields,
    join_text,
)
from stages.serve.api.generation import run
from stages.serve.api.jobs import ChatPrompt, Job
from stages.serve.api.logprobs import token_logprob
from stages.serve.api.requests import ApiCall, ignored_header, json_reply
from stages.serve.api.sampling_fields import SamplingFields
from stages.serve.api.writer import EventWriter, Piece, Usage
from stages.serve.errors import ApiError
from stages.serve.grammar import Grammar, answer_grammar
from stages.serve.tokenizer_pool import token_text
from stages.serve.tools import Function, ToolCall, Turn, call_turn, make_turn, tool_use


class InputText(StrictFields):
    """A text of a message, or of an earlier answer."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: EmptyList | None = None
    logprobs: list[JsonObject] | None = None  # as they came


class InputItem(StrictFields):
    """A message, an answer as it was sent, a call of a function, what it returned, or reasoning.

    No template reads reasoning.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | Annotated[list[InputText], Meta(max_length=256)] | None = ""
    summary: Several[InputText] | None = None
    encrypted_content: str | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[InputText] = ""
    id: str | None = None
    status: str | None = None
    phase: str | None = None


def _turns(items: list[InputItem]) -> list[Turn]:
    """Returns the items as messages; calls belong to the assistant's message before them.

    Raises InvalidField.
    """
    turns: list[Turn] = []
    for number, item in enumerate(items):
        if item.type == "reasoning":
            continue
        if item.type == "message":
            if not item.content and item.content != "":
                field = f"input[{number}].content"
                raise InvalidField(field, f"{field} has no parts: give at least one, or a text.")
            turns.append(make_turn(item.role, join_text(item.content)))
        elif item.type == "function_call_output":
            turns.append(make_turn("tool", join_text(item.output), tool_call_id=item.call_id))
        else:
            if not turns or turns[-1]["role"] != "assistant":
                turns.append(make_turn("assistant", ""))
            turns[-1].setdefault("tool_calls", []).append(call_turn(item.call_id, item.name, item.arguments))
    return turns


class FunctionField(Function, kw_only=True):
    type: Literal["function"]


class NamedField(StrictFields):
    """The tool that is to be called."""

    type: Literal["function"]
    name: str


class TextFormat(StrictFields, omit_defaults=True):
    """The format of an answer: text, a JSON object, or JSON that satisfies a schema, `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: JsonObject = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(StrictFields):
    format: TextFormat | None = None
    verbosity: str | None = None


class EventOptions(StrictFields):
    include_obfuscation: Literal[False] | None = None


# A reply may include log-probabilities. The others are parts of items that no answer here has.
Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class ResponseRequest(SamplingFields, kw_only=True):
    """POST /v1/responses. `input`: a question, or a conversation.

    `truncation` auto allows that a conversation is cut which is too long. It is refused all the
    same, as is `enable_response_messages`, by which vLLM adds the messages that the model read and wrote.
    """

    input: str | MessageList[InputItem]
    instructions: str | None = None
    max_tokens: MaxTokens | None = msgspec.field(default=None, name="max_output_tokens")
    text: TextOptions | None = None
    store: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream_options: EventOptions | None = None
    include: Several[Includable] | None = None
    top_logprobs: LogProbs | None = None
    tools: Several[FunctionField] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedField | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    enable_response_messages: Literal[False] | None = None

    @property
    def ignored(self) -> list[str]:
        names = super().ignored
        if self.text and self.text.verbosity is not None:
            names.append("text.verbosity")
        if isinstance(self.input, list) and any(item.type == "reasoning" for item in self.input):
            names.append("input.reasoning")
        return names

    @property
    def logprobs(self) -> int | None:
        """As of SamplingParams: how many probable tokens come beside each one; None for no
        log-probabilities.

        Raises InvalidField.
        """
        if "message.output_text.logprobs" not in (self.include or ()):
            if self.top_logprobs:
                message = "top_logprobs is given without message.output_text.logprobs in include."
                raise InvalidField("top_logprobs", message)
            return None
        if self.tools:
            raise InvalidField(
                "include", "include: message.output_text.logprobs is not granted beside tools."
            )
        return self.top_logprobs or 0

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat("text")

    @property
    def grammars(self) -> list[Grammar]:
        grammars = super().grammars
        if self.format.type != "text":
            grammars.append(answer_grammar("text.format.schema", self.format.schema))
        return grammars

    @property
    def prompt(self) -> ChatPrompt:
        """The conversation. Raises InvalidField."""
        turns: list[Turn] = []
        if self.instructions:
            turns.append(make_turn("system", self.instructions))
        if isinstance(self.input, str):
            turns.append(make_turn("user", self.input))
        else:
            turns += _turns(self.input)
        tool_name = self.tool_choice.name if isinstance(self.tool_choice, NamedField) else None
        tools = tool_use(self.tools or (), tool_name, self.tool_choice, self.parallel_tool_calls)
        return ChatPrompt("input", turns, tools=tools)

    def job(self, defaults: SamplingParams) -> Job:
        """Returns what the request asks for, where the `defaults` stand for what it leaves out.

        Raises InvalidField.
        """
        sampling = self.sampling(defaults, self.max_tokens, self.logprobs)
        return self.make_job(self.prompt, sampling)


class ResponseReply(msgspec.Struct, kw_only=True):
    """A whole reply, and what the first and last events of a stream hold.

    `output`: a message, calls of functions, or both.

    The sampling parameters are those that were used, the model's where the request has none.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    model: str
    output: list[dict[str, Any]] = []
    usage: JsonObject = None
    incomplete_details: dict[str, str] | None = None
    error: None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    text: TextOptions
    tools: list[FunctionField]
    tool_choice: str | NamedField
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    truncation: Literal["auto", "disabled"]
    previous_response_id: None = None
    background: bool = False
    store: bool = False


class ResponseWriter(EventWriter):
    """Fills one ResponseReply, of which the first and last events of a stream are states.

    `sampling`: that of the completion, which the reply tells.
    """

    def __init__(self, call: ApiCall[ResponseRequest], sampling: SamplingParams) -> None:
        body = call.body
        self._tokenizer = call.state.tokenizer.tokenizer
        self._reply = ResponseReply(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            model=call.model.name,
            instructions=body.instructions,
            max_output_tokens=body.max_tokens,
            metadata=body.metadata or {},
            text=TextOptions(body.format),
            tools=body.tools or [],
            tool_choice=body.tool_choice or "auto",
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            top_logprobs=body.top_logprobs or 0,
            truncation=body.truncation or "disabled",
        )
        self._output = self._reply.output
        self._status: Literal["completed", "incomplete"] = "completed"
        self._count = 0

    def reply(self, pieces: list[Piece], usage: Usage) -> ResponseReply:
        # To write the events is to fill the reply.
        list(self.chunks(pieces[0]))
        list(self.end(usage))
        return self._reply

    def begin(self, usage: Usage) -> Iterator[dict[str, Any]]:
        yield self._event("created", response=self._reply)
        yield self._event("in_progress", response=self._reply)

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        self._status = "incomplete" if piece.finish_reason == "length" else "completed"
        ends_empty = piece.finish_reason and not piece.calls and not self._output
        if piece.text or piece.logprobs or ends_empty:
            yield from self._add_text(piece)
        for call in piece.calls:
            yield from self._add_call(call)

    def _add_text(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Adds text to the message, which begins with the first of it, perhaps empty."""
        if not self._output or self._output[-1]["type"] != "message":
            yield from self._open("message", f"msg_{uuid.uuid4().hex}", role="assistant", content=[])
            yield self._part_event("content_part.added", part=_part(""))
            self._output[-1]["content"] = [_part("")]
        if not piece.text and not piece.logprobs:
            return
        text_of = partial(token_text, self._tokenizer)
        logprobs = [token_logprob(logprob, text_of) for logprob in piece.logprobs]
        (part,) = self._output[-1]["content"]
        part["text"] += piece.text
        part["logprobs"] += logprobs
        yield self._part_event("output_text.delta", delta=piece.text, logprobs=logprobs)

    def _add_call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        """Adds the next part of a call, which is an item of its own."""
        if call.id:
            yield from self._open(
                "function_call", f"fc_{uuid.uuid4().hex}", call_id=call.id, name=call.name, arguments=""
            )
        if call.arguments:
            self._output[-1]["arguments"] += call.arguments
            yield self._item_event("function_call_arguments.delta", delta=call.arguments)

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._reply.status = self._status
        self._reply.usage = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }
        if usage.cost is not UNSET:
            self._reply.usage["cost"] = usage.cost
        if self._status == "completed":
            self._reply.completed_at = int(time.time())
        else:
            self._reply.incomplete_details = {"reason": "max_output_tokens"}
        yield self._event(self._status, response=self._reply)

    def _open(self, kind: str, id: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Ends the item before, and begins the next."""
        yield from self._close()
        self._output.append({"id": id, "type": kind, "status": "in_progress", **fields})
        yield self._event("output_item.added", output_index=len(self._output) - 1, item=self._output[-1])

    def _close(self) -> Iterator[dict[str, Any]]:
        """Ends the last item."""
        if not self._output:
            return
        item = self._output[-1]
        item["status"] = self._status
        if item["type"] == "message":
            (part,) = item["content"]
            yield self._part_event("output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._part_event("content_part.done", part=part)
        else:
            yield self._item_event(
                "function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        yield self._event("output_item.done", output_index=len(self._output) - 1, item=item)

    def error(self, error: ApiError) -> bytes:
        fields = msgspec.to_builtins(error.error) | {"type": "error", "sequence_number": self._count}
        return self.frame(fields)

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, output_index=len(self._output) - 1, item_id=self._output[-1]["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": f"response.{kind}", "sequence_number": self._count - 1, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def create_response(call: ApiCall[ResponseRequest]) -> ASGIApp:
    """Answers a conversation, as events or whole."""
    job = call.body.job(call.state.sampling)
    return await run(call, job, ResponseWriter(call, job.sampling))


class InputTokensReply(msgspec.Struct):
    object: Literal["response.input_tokens"]
    input_tokens: int


async def count_input_tokens(call: ApiCall[ResponseRequest]) -> Response:
    """The tokens of a conversation."""
    prompts = await call.body.prompt.encode(call.state)
    reply = InputTokensReply("response.input_tokens", len(prompts.tokens[0]))
    return json_reply(reply, headers=ignored_header([*call.body.ignored, *prompts.ignored]))
