"""POST /tokenize and /detokenize, GET /tokenizer_info: texts as tokens, and back."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from engine.errors import InvalidField
from stages.serve.api.chat import Messages, Tools, chat_prompt
from stages.serve.api.fields import ModelRequest, TokenIds
from stages.serve.api.jobs import check_ids
from stages.serve.api.requests import ApiCall
from stages.serve.tools import tool_use


class TokenizeRequest(ModelRequest):
    """POST /tokenize: a text as /v1/completions reads it, or messages as /v1/chat/completions does.

    `add_special_tokens`, true by default, is about a text; those of a conversation are its
    template's.
    """

    prompt: str | UnsetType = UNSET
    messages: Messages | UnsetType = UNSET
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | UnsetType = UNSET
    tools: Tools = None


class TokenizeReply(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: Sequence[int]


class DetokenizeRequest(ModelRequest, kw_only=True):
    tokens: TokenIds


class DetokenizeReply(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct):
    """By this lm-eval finds that it may use the server's tokenizer."""

    eos_token: str
    bos_token: str | None
    chat_template: str


async def tokenizer_info(call: ApiCall) -> TokenizerInfo:
    """The names of special tokens, and the chat template."""
    pool = call.state.tokenizer
    names = pool.tokenizer.special_names
    return TokenizerInfo(names["eos_token"], names.get("bos_token"), pool.template)


async def tokenize(call: ApiCall[TokenizeRequest]) -> TokenizeReply:
    """The tokens of a text, or of a conversation."""
    body = call.body
    if (body.prompt is UNSET) == (body.messages is UNSET):
        raise InvalidField("prompt", "Either prompt or messages is to be given.")
    if isinstance(body.messages, list):
        tokens = await _conversation_tokens(call, body.messages)
    else:
        tokens = await _text_tokens(call, str(body.prompt))
    return TokenizeReply(len(tokens), call.state.engine.capacity, tokens)


async def _conversation_tokens(call: ApiCall[TokenizeRequest], messages: Messages) -> Sequence[int]:
    """Returns the tokens of a conversation. Raises InvalidField."""
    body = call.body
    if body.add_special_tokens is not UNSET:
        others = "the special tokens of messages are those of the chat template"
        message = f"add_special_tokens is about a prompt; {others}."
        raise InvalidField("add_special_tokens", message)
    prompt = chat_prompt(
        messages,
        tool_use([tool.function for tool in body.tools or ()]),
        begins=body.add_generation_prompt,
        goes_on=body.continue_final_message,
    )
    (tokens,) = (await prompt.encode(call.state)).tokens
    return tokens


async def _text_tokens(call: ApiCall[TokenizeRequest], text: str) -> Sequence[int]:
    """Returns the tokens of a text. Raises InvalidField."""
    body = call.body
    if body.add_generation_prompt is not None or body.continue_final_message is not None:
        message = "add_generation_prompt and continue_final_message are about messages, not a prompt."
        raise InvalidField("continue_final_message", message)
    is_special = body.add_special_tokens is not False
    (tokens,) = await call.state.tokenizer.encode([text], special=is_special)
    return tokens


async def detokenize(call: ApiCall[DetokenizeRequest]) -> DetokenizeReply:
    """The text of tokens."""
    tokens = call.body.tokens
    check_ids("tokens", tokens, call.state.engine.cfg.vocab)
    return DetokenizeReply(await call.state.tokenizer.decode(tokens))
