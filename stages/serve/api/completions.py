"""POST /v1/completions, OpenAI's: continues texts. Its fields of sampling and the form of its replies are the chat's too."""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from engine.inference.constraints import choice_grammar, json_grammar, lark_grammar, regex_grammar
from engine.inference.request import LogProb
from engine.text.documents import Passage
from stages.serve.api.generation import Generation, Piece, Prompts, Reason, Usage, generate, text_prompts
from stages.serve.api.requests import (
    MAX_PROMPTS,
    MAX_STOPS,
    GenerationRequest,
    LogProbs,
    MaxTokens,
    Stops,
    StopText,
    Texts,
    TokenId,
    in_range,
)
from stages.serve.api.writer import Writer, respond
from stages.serve.errors import ApiError
from stages.serve.grammars import Grammar
from stages.serve.state import ServedModel, ServerState
from stages.serve.tokenizer_pool import token_text

DEFAULT_MAX_TOKENS = 16  # as OpenAI has it

Penalty = Annotated[float, Meta(ge=-2, le=2)]  # as OpenAI has it; the engine takes more
BiasedToken = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8})$(?!\n)")]  # one spelling of each token
LogitBias = Annotated[dict[BiasedToken, Annotated[float, in_range("logit_bias")]], Meta(max_length=1024)]


GRAMMARS: dict[str, Callable[..., str]] = {
    "guided_json": json_grammar,
    "guided_regex": regex_grammar,
    "guided_choice": choice_grammar,
    "guided_grammar": lark_grammar,
    "grammar": lark_grammar,
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage`: a last chunk has the token counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class CompletionFields(GenerationRequest, kw_only=True):
    """The fields of both kinds of completion. Null means the default."""

    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, in_range("min_tokens")] | None = None
    temperature: Annotated[float, in_range("temperature")] | None = None
    top_p: Annotated[float, in_range("top_p")] | None = None
    top_k: Annotated[int, in_range("top_k")] | None = None
    min_p: Annotated[float, in_range("min_p")] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, in_range("repetition_penalty")] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[StopText], Meta(min_length=1)] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None

    @property
    def grammars(self) -> list[Grammar]:
        """The grammars that the request asks for, under vLLM's names and llama.cpp's `grammar`."""
        given = {name: getattr(self, name) for name in GRAMMARS}
        return [Grammar(name, partial(GRAMMARS[name], value)) for name, value in given.items() if value is not None]

    async def generate(
        self, state: ServerState, http: HttpRequest, prompts: Prompts, *, scores: bool = False, **options: Any
    ) -> Generation:
        """Begins the completions; `options` are fields of SamplingParams that this kind has in its own form."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is given without stream being true.", param="stream_options")
        bias = {int(token): value for token, value in (self.logit_bias or {}).items() if value}
        names = (*DefaultSampling.__struct_fields__, "min_tokens", "seed", "stop_token_ids")
        given = {name: getattr(self, name) for name in names} | {"logit_bias": bias} | options
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return await generate(
            state,
            http,
            prompts,
            given,
            n=self.n or 1,
            stops=stops,
            ignore_eos=self.ignore_eos,
            grammars=self.grammars,
            scores=scores,
        )


class CompletionRequest(CompletionFields, kw_only=True):
    """POST /v1/completions. `prompt`: a text, several, a list of token ids, or several such lists.

    `echo`: the prompt comes before its completion, its log-probabilities too. `max_tokens` may then be 0.
    """

    prompt: Texts
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: LogProbs | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class DocumentsUse(msgspec.Struct):
    """The passages of documents in a prompt, their tokens, and about the seconds that reading them took."""

    tokens: int
    seconds: float
    passages: Sequence[Passage]


def documents_use(usage: Usage) -> DocumentsUse | UnsetType:
    """Returns this server's own field of a reply, absent without passages; reading takes them their share of the tokens."""
    tokens, read = sum(passage.tokens for passage in usage.passages), usage.prompt - usage.cached
    share = min(tokens / max(read, 1), 1)
    return DocumentsUse(tokens, round(usage.first_seconds * share, 4), usage.passages) if usage.passages else UNSET


class ReplyFields(msgspec.Struct, kw_only=True):
    """The fields of all replies and chunks with completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    documents: DocumentsUse | UnsetType = UNSET


class CachedTokens(msgspec.Struct):
    """Tokens of the prompt that the prefix cache held."""

    cached_tokens: int


class ReplyUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogProbs(msgspec.Struct):
    """Lists of one length: tokens, log-probabilities, the most probable in their place, and the offsets in the text.

    The first token of a prompt has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: Reason | None
    logprobs: CompletionLogProbs | None = None


class CompletionReply(ReplyFields, kw_only=True):
    """A whole reply, and one `data:` of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: ReplyUsage | UnsetType | None = UNSET


class DefaultSampling(msgspec.Struct):
    """The sampling of a request that leaves these fields out. They have the same name and meaning in SamplingParams."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float


class ChoicesWriter(Writer):
    """Writes completions as choices, `choice` a whole one."""

    id_prefix: ClassVar[str]
    reply_type: ClassVar[Any]
    chunk_type: ClassVar[Any]

    def __init__(self, state: ServerState, model: ServedModel, body: CompletionFields) -> None:
        self.tokenizer = state.tokenizer.tokenizer
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def choice(self, piece: Piece) -> Any:
        raise NotImplementedError

    def reply(self, pieces: list[Piece], usage: Usage) -> Any:
        choices = list(map(self.choice, pieces))
        return self.reply_type(**self._head, choices=choices, usage=reply_usage(usage), documents=documents_use(usage))

    def chunk(self, *choices: Any, usage: ReplyUsage | None = None, documents: DocumentsUse | UnsetType = UNSET) -> Any:
        usage_field = usage if self._wants_usage else UNSET
        return self.chunk_type(**self._head, choices=list(choices), usage=usage_field, documents=documents)

    def end(self, usage: Usage) -> Iterable[Any]:
        return [self.chunk(usage=reply_usage(usage), documents=documents_use(usage))] if self._wants_usage else []


def reply_usage(usage: Usage) -> ReplyUsage:
    return ReplyUsage(usage.prompt, usage.completion, usage.prompt + usage.completion, CachedTokens(usage.cached))


class CompletionWriter(ChoicesWriter):
    id_prefix, reply_type, chunk_type = "cmpl", CompletionReply, CompletionReply

    def __init__(self, state: ServerState, model: ServedModel, body: CompletionRequest, choices: int) -> None:
        super().__init__(state, model, body)
        self._top_logprobs = body.logprobs
        self._offsets = [0] * choices
        self._streams = [self.tokenizer.stream() for _ in range(choices)]

    def choice(self, piece: Piece) -> CompletionChoice:
        return CompletionChoice(piece.choice, piece.text, piece.finish_reason, self._logprobs(piece))

    def chunks(self, piece: Piece) -> list[Any]:
        return [self.chunk(self.choice(piece))] if piece.text or piece.logprobs or piece.finish_reason else []

    def _logprobs(self, piece: Piece) -> CompletionLogProbs | None:
        if self._top_logprobs is None:
            return None
        offsets, logprobs = [], piece.logprobs
        for each in logprobs:
            offsets.append(self._offsets[piece.choice])  # part of a character: its offset
            self._offsets[piece.choice] += len(self._streams[piece.choice].push(each.token))
        name = lambda token: token_text(self.tokenizer, token)[0]
        top = [{name(token): nats for token, nats in each.top} or None for each in logprobs] if self._top_logprobs else None
        values = [None if each.logprob != each.logprob else each.logprob for each in logprobs]
        return CompletionLogProbs([name(each.token) for each in logprobs], values, top, offsets)


class EchoWriter(CompletionWriter):
    """Writes replies in which each completion comes behind its prompt. `prompts`: their tokens, once they are encoded."""

    def __init__(
        self, state: ServerState, model: ServedModel, body: CompletionRequest, choices: int, prompts: list[list[int]]
    ) -> None:
        super().__init__(state, model, body, choices)
        self._prompts, self._n, self._completes = prompts, body.n or 1, body.max_tokens != 0

    def reply(self, pieces: list[Piece], usage: Usage) -> Any:
        rest, echoed = iter(pieces), list[Piece]()
        for prompt in self._prompts:
            scores = next(rest).logprobs if self._top_logprobs is not None and len(prompt) > 1 else []
            for _ in range(self._n):
                piece = next(rest) if self._completes else Piece(0, "", [], "length")
                logprobs = [LogProb(prompt[0], math.nan, ()), *scores, *piece.logprobs]
                text = self.tokenizer.decode(prompt) + piece.text
                echoed.append(piece._replace(choice=len(echoed), text=text, logprobs=logprobs))
        return super().reply(echoed, usage._replace(prompt=sum(map(len, self._prompts))))


async def completions(state: ServerState, http: HttpRequest, body: CompletionRequest) -> ASGIApp:
    """Continues each prompt `n` times; the choices of a prompt follow each other."""
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens must be at least 1, or 0 with echo.", param="max_tokens")
    if body.echo and body.stream:
        raise ApiError(400, "echo is answered whole: leave stream out.", param="echo")
    prompts = text_prompts(state, "prompt", body.prompt, MAX_PROMPTS)
    choices, encoded = prompts.number * (body.n or 1), list[list[int]]()

    async def encode() -> list[list[int]]:
        encoded[:] = await prompts.encode()
        return encoded

    arguments = state, http.state.model, body, choices
    writer = EchoWriter(*arguments, encoded) if body.echo else CompletionWriter(*arguments)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    scores = bool(body.echo and body.logprobs is not None)
    generation = await body.generate(
        state, http, prompts._replace(encode=encode), max_tokens=max_tokens, logprobs=body.logprobs, scores=scores
    )
    return respond(body, writer, generation)
