"""POST /v1/completions, OpenAI's: continues texts."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from engine.errors import InvalidField
from engine.inference.request import LogProb, SamplingParams
from engine.text.detokenizer import Detokenizer
from stages.serve.api.choices import ChoicesWriter, CompletionFields, ReplyFields, ReplyUsage
from stages.serve.api.fields import MAX_PROMPTS, LogProbs, Texts, prompt_texts
from stages.serve.api.generation import run
from stages.serve.api.jobs import Job, TextPrompts
from stages.serve.api.requests import ApiCall
from stages.serve.api.writer import Piece, Reason, Usage

DEFAULT_MAX_TOKENS = 16  # as OpenAI has it


class CompletionRequest(CompletionFields, kw_only=True):
    """POST /v1/completions. `prompt`: a text, several, a list of token ids, or several such lists.

    `add_special_tokens`, true by default: a text begins with the model's start tokens. `echo`: the
    prompt comes before its completion, its log-probabilities too. `max_tokens` may then be 0.
    """

    prompt: Texts
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: LogProbs | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def choices(self) -> int:
        return (self.n or 1) * len(prompt_texts("prompt", self.prompt, MAX_PROMPTS))

    def job(self, defaults: SamplingParams) -> Job:
        """Returns what the request asks for, where the `defaults` stand for what it leaves out.

        Raises InvalidField.
        """
        if self.max_tokens == 0 and not self.echo:
            raise InvalidField("max_tokens", "max_tokens must be at least 1, or 0 with echo.")
        if self.echo and self.stream:
            raise InvalidField("echo", "echo is answered whole: leave stream out.")
        texts = prompt_texts("prompt", self.prompt, MAX_PROMPTS)
        prompt = TextPrompts("prompt", texts, special=self.add_special_tokens is not False)
        max_tokens = self.max_tokens
        if max_tokens is None:
            max_tokens = DEFAULT_MAX_TOKENS
        self.check_stream_options()
        sampling = self.sampling(defaults, max_tokens or None, self.logprobs)
        n = self.n or 1
        if max_tokens == 0:  # the reply has the prompts alone
            n = 0
        job = self.make_job(prompt, sampling, n)
        return dataclasses.replace(job, scores=bool(self.echo and self.logprobs is not None))


class CompletionLogProbs(msgspec.Struct):
    """Lists of one length: tokens, log-probabilities, the most probable ones, and the offsets in the text.

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


class CompletionWriter(ChoicesWriter):
    """Writes completions of texts."""

    id_prefix = "cmpl"
    reply_type = CompletionReply
    chunk_type = CompletionReply

    def __init__(self, call: ApiCall[CompletionRequest]) -> None:
        super().__init__(call)
        # Of each choice: where the next token begins in its text, and the tokens so far.
        self._offsets = defaultdict[int, int](int)
        self._streams = defaultdict[int, Detokenizer](self.tokenizer.stream)

    def choice(self, piece: Piece) -> CompletionChoice:
        return CompletionChoice(piece.choice, piece.text, piece.finish_reason, self._logprobs(piece))

    def chunks(self, piece: Piece) -> Iterable[Any]:
        if piece.text or piece.logprobs or piece.finish_reason:
            yield self.chunk([self.choice(piece)])

    def _logprobs(self, piece: Piece) -> CompletionLogProbs | None:
        """Returns the log-probabilities of a piece, if the body asks for them, as columns."""
        if self.body.logprobs is None:
            return None
        columns = CompletionLogProbs(tokens=[], token_logprobs=[], top_logprobs=None, text_offset=[])
        tops: list[dict[str, float] | None] = []
        for logprob in piece.logprobs:
            columns.tokens.append(self._name(logprob.token))
            value = None if math.isnan(logprob.logprob) else logprob.logprob
            columns.token_logprobs.append(value)
            top = {self._name(token): nats for token, nats in logprob.top}
            tops.append(top or None)
            columns.text_offset.append(self._offsets[piece.choice])  # part of a character: its offset
            self._offsets[piece.choice] += len(self._streams[piece.choice].push(logprob.token))
        if self.body.logprobs > 0:
            columns.top_logprobs = tops
        return columns

    def _name(self, token: int) -> str:
        """Returns the text of a token, as `token_text` has it."""
        text, _ = self.token_text(token)
        return text


class EchoWriter(CompletionWriter):
    """Writes replies in which each completion comes behind its prompt, of tokens."""

    def __init__(self, call: ApiCall[CompletionRequest], prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(call)
        self._prompts = prompts

    def reply(self, pieces: list[Piece], usage: Usage) -> Any:
        # As `make_requests` orders them: for each prompt its scores, if any, and its completions, if any.
        rest = iter(pieces)
        choices: list[Piece] = []
        for prompt in self._prompts:
            prompt_text = self.tokenizer.decode(prompt)
            prompt_logprobs = [LogProb(prompt[0], math.nan, ())]
            if self.body.logprobs is not None and len(prompt) > 1:
                prompt_logprobs += next(rest).logprobs
            for _ in range(self.body.n or 1):
                piece = Piece(0, "", [], "length")
                if self.body.max_tokens != 0:
                    piece = next(rest)
                choice = piece._replace(
                    choice=len(choices),
                    text=prompt_text + piece.text,
                    logprobs=[*prompt_logprobs, *piece.logprobs],
                )
                choices.append(choice)
        return super().reply(choices, usage._replace(prompt=sum(map(len, self._prompts))))


async def create_completion(call: ApiCall[CompletionRequest]) -> ASGIApp:
    """Continues texts.

    Each prompt `n` times; the choices of a prompt follow each other.
    """
    job = call.body.job(call.state.sampling)
    if not call.body.echo:
        return await run(call, job, CompletionWriter(call))
    tokens = (await job.prompt.encode(call.state)).tokens
    job = dataclasses.replace(job, prompt=TextPrompts("prompt", tokens))
    return await run(call, job, EchoWriter(call, tokens))
