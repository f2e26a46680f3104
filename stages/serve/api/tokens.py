"""POST /tokenize and /detokenize, GET /tokenizer_info, vLLM's: a text or a conversation to tokens, and back."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from stages.serve.api.completions import Messages, Tools, conversation
from stages.serve.api.requests import Call, ModelRequest, TokenIds
from stages.serve.errors import ApiError
from stages.serve.tools import tool_use


class TokenizeRequest(ModelRequest, kw_only=True):
    """POST /tokenize: a text as /v1/completions reads it, or messages as /v1/chat/completions does.

    `add_special_tokens`, true by default, is about a text; those of a conversation are its template's.
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


async def tokenizer_info(call: Call) -> TokenizerInfo:
    """The names of special tokens, and the chat template."""
    pool = call.state.tokenizer
    names = pool.tokenizer.special_names
    return TokenizerInfo(names["eos_token"], names.get("bos_token"), pool.template)


async def tokenize(call: Call[TokenizeRequest]) -> TokenizeReply:
    """The tokens of a text, or of a conversation."""
    state, body = call.state, call.body
    if (body.prompt is UNSET) == (body.messages is UNSET):
        raise ApiError(400, "Either prompt or messages is to be given.", param="prompt")
    if isinstance(body.messages, list):
        if body.add_special_tokens is not UNSET:
            message = "add_special_tokens is about a prompt; the special tokens of messages are those of the chat template."
            raise ApiError(400, message, param="add_special_tokens")
        tools = tool_use([tool.function for tool in body.tools or ()])
        (tokens,) = (await conversation(call, tools)).tokens
    else:
        if body.add_generation_prompt is not None or body.continue_final_message is not None:
            message = "add_generation_prompt and continue_final_message are about messages, not a prompt."
            raise ApiError(400, message, param="continue_final_message")
        (tokens,) = await state.tokenizer.encode([str(body.prompt)], special=body.add_special_tokens is not False)
    return TokenizeReply(len(tokens), state.engine.capacity, tokens)


async def detokenize(call: Call[DetokenizeRequest]) -> DetokenizeReply:
    """The text of tokens."""
    tokens, vocab = call.body.tokens, call.state.engine.cfg.vocab
    if tokens and max(tokens) >= vocab:
        raise ApiError(400, f"tokens holds an id outside the vocabulary of {vocab:,}.", param="tokens")
    return DetokenizeReply(await call.state.tokenizer.decode(tokens))
