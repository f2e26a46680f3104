"""Choices: the fields, replies and writer that OpenAI's chats and text completions share."""

import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from engine.errors import InvalidField
from stages.serve.api.fields import MaxTokens, StrictFields
from stages.serve.api.requests import ApiCall
from stages.serve.api.sampling_fields import SamplingFields
from stages.serve.api.writer import Piece, Usage, Writer
from stages.serve.bill import Bill
from stages.serve.tokenizer_pool import token_text


class StreamOptions(StrictFields):
    """`include_usage`: a last chunk has the token counts."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None  # vLLM's
    include_obfuscation: Literal[False] | None = None


class CompletionFields(SamplingFields):
    """The fields of a chat's and a text's completions. Null means the default.

    `return_tokens_as_token_ids`: a token with a log-probability is called `token_id:5`.
    """

    max_tokens: MaxTokens | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    stream_options: StreamOptions | None = None

    def check_stream_options(self) -> None:
        """Raises InvalidField for options of a stream where none is asked for."""
        if self.stream_options is not None and not self.stream:
            raise InvalidField("stream_options", "stream_options is given without stream being true.")


class ReplyFields(msgspec.Struct, kw_only=True):
    """The fields of all replies and chunks with completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class CachedTokens(msgspec.Struct):
    """Tokens of the prompt that the prefix cache held."""

    cached_tokens: int


class ReplyUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    cost: Bill | UnsetType = UNSET


def reply_usage(usage: Usage) -> ReplyUsage:
    return ReplyUsage(
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        total_tokens=usage.prompt + usage.completion,
        prompt_tokens_details=CachedTokens(usage.cached),
        cost=usage.cost,
    )


class ChoicesWriter(Writer):
    """Writes completions as choices, `choice` a whole one."""

    id_prefix: ClassVar[str]
    reply_type: ClassVar[Any]
    chunk_type: ClassVar[Any]

    def __init__(self, call: ApiCall) -> None:
        self.tokenizer = call.state.tokenizer.tokenizer
        self.body = call.body
        options = self.body.stream_options
        self._wants_usage = call.wants_cost or bool(options and options.include_usage)
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": call.model.name,
            "system_fingerprint": call.model.fingerprint,
        }

    def choice(self, piece: Piece) -> Any:
        raise NotImplementedError

    def token_text(self, token: int) -> tuple[str, bytes]:
        """Returns the text of a token, or `token_id:` and its id if the body asks for that; and its bytes."""
        text, content = token_text(self.tokenizer, token)
        if self.body.return_tokens_as_token_ids:
            text = f"token_id:{token}"
        return text, content

    def reply(self, pieces: list[Piece], usage: Usage) -> Any:
        choices = list(map(self.choice, pieces))
        return self.reply_type(**self._head, choices=choices, usage=reply_usage(usage))

    def chunk(self, choices: list[Any], usage: ReplyUsage | None = None) -> Any:
        usage_field = usage if self._wants_usage else UNSET
        return self.chunk_type(**self._head, choices=choices, usage=usage_field)

    def end(self, usage: Usage) -> Iterable[Any]:
        if self._wants_usage:
            yield self.chunk([], reply_usage(usage))
