"""Job: what a request for completions asks for, in no dialect's words; the engine's requests it becomes."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

from engine.errors import InvalidField
from engine.inference.constraints import Constraint, ForcedTokens
from engine.inference.request import SEEDS, Request, SamplingParams, check_request
from engine.text.documents import Passage
from stages.serve.api.requests import ApiCall
from stages.serve.api.template_variables import unread_variables
from stages.serve.grammar import Grammar
from stages.serve.state import ServerState
from stages.serve.tokenizer_pool import context_overflow
from stages.serve.tool_grammar import tool_grammar
from stages.serve.tools import NO_TOOLS, ToolUse, Turn

AS_MANY_AS_FIT = 2**31 - 1  # tokens of a completion


class PromptTokens(NamedTuple):
    """The tokens of one request's prompts, and what follows from them for its completions."""

    tokens: Sequence[Sequence[int]]
    # Tokens each of which ends a completion.
    stop_token_ids: frozenset[int]
    # Whether a completion begins with a space that is not part of its text.
    strips_space: bool = False
    # Passages of documents, whose tokens are in the prompt.
    passages: Sequence[Passage] = ()
    # Names of the body's fields that change no prompt.
    ignored: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A conversation, up to the assistant's next turn, and what else its template reads."""

    # The name of the body's field that has the conversation.
    field: str
    turns: Sequence[Turn]
    # The beginning of the assistant's turn, which the completion continues.
    answer: str = ""
    # The tools that a completion may call.
    tools: ToolUse = NO_TOOLS
    # What the template reads beside the turns and the tools.
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Whether the model is to think before it answers; None: as its template has it.
    thinks: bool | None = None

    async def encode(self, state: ServerState) -> PromptTokens:
        """Returns the tokens, as the chat template has them. Raises ApiError and InvalidField."""
        pool = state.tokenizer
        variables = dict(self.variables)
        if self.thinks is not None:
            variables["enable_thinking"] = self.thinks  # as the templates of Qwen3 and others call it
        tokens, passages = await pool.encode_chat(self.turns, self.answer, variables, self.tools.tools)
        return PromptTokens(
            [tokens],
            state.stop_token_ids | pool.eot_ids,
            strips_space=pool.strips_space and not self.answer,
            passages=passages,
            ignored=unread_variables(pool.template, self.variables),
        )


@dataclasses.dataclass(frozen=True)
class TextPrompts:
    """Texts to be continued, each a string, or each a list of token ids."""

    tools: ClassVar[ToolUse] = NO_TOOLS
    # The name of the body's field that has the texts.
    field: str
    texts: Sequence[str] | Sequence[Sequence[int]]
    # Whether a string begins with the model's start tokens.
    special: bool = True

    async def encode(self, state: ServerState) -> PromptTokens:
        """Returns the tokens of the texts, of one token or more each. Raises InvalidField."""
        vocab = state.engine.cfg.vocab
        tokens: Sequence[Any] = self.texts
        if isinstance(self.texts[0], str):
            tokens = await state.tokenizer.encode(tokens, self.special)
        for number, each in enumerate(tokens):
            name = self.field
            if len(tokens) > 1:
                name += f"[{number}]"
            if not each:
                raise InvalidField(self.field, f"{name} has no tokens; give at least one.")
            check_ids(self.field, each, vocab, name)
        return PromptTokens(tokens, state.stop_token_ids)


def check_ids(field: str, ids: Sequence[int], vocab: int, name: str = "") -> None:
    """Raises InvalidField for an id above the vocabulary. `name`: of the ids, where a field holds more."""
    if max(ids, default=-1) >= vocab:
        raise InvalidField(field, f"{name or field} holds an id outside the vocabulary of {vocab:,}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a request for completions asks for."""

    prompt: ChatPrompt | TextPrompts
    # How the first completion of the first prompt is sampled; the others have the seeds after its
    # own. As many tokens are generated as fit, and at most `max_tokens`.
    sampling: SamplingParams
    # Completions of each prompt; 0 where only the prompts' scores are asked for.
    n: int = 1
    # Strings that end a completion.
    stops: Sequence[str] = ()
    # Whether the text ends with the stop string, and not before it.
    keeps_stop: bool = False
    # Whether a completion goes on after the tokens by which the model ends a text.
    ignores_eos: bool = False
    # The grammar that every completion keeps to.
    grammar: Grammar | None = None
    # Whether the log-probabilities of each prompt's tokens but its first come before its
    # completions.
    scores: bool = False
    # Only requests with the same salt share the prefix cache.
    cache_salt: str = ""
    # Whether the reply is a stream.
    streams: bool = False
    # Names of the body's fields that change no answer.
    ignored: Sequence[str] = ()


def sampling_of(defaults: SamplingParams, **fields: Any) -> SamplingParams:
    """Returns the defaults with the fields that a request gives: None stands for a field that it leaves out.

    Without `max_tokens` a completion goes on as long as it fits, without `seed` it has a random
    one. Raises InvalidField.
    """
    values = {name: value for name, value in fields.items() if value is not None}
    max_tokens = values.pop("max_tokens", AS_MANY_AS_FIT)
    seed = values.pop("seed", int.from_bytes(os.urandom(4)))
    return dataclasses.replace(defaults, max_tokens=max_tokens, seed=seed % SEEDS, **values)


def only_grammar(grammars: Sequence[Grammar]) -> Grammar | None:
    """Returns the grammar for which a request asks, if it does. Raises InvalidField for more than one."""
    if len(grammars) > 1:
        message = (
            f"{grammars[1].field} is sent beside {grammars[0].field}: a completion keeps to only one grammar."
        )
        raise InvalidField(grammars[1].field, message)
    return grammars[0] if grammars else None


async def compile_grammar(state: ServerState, job: Job) -> Constraint | None:
    """Returns what the completions of a job keep to: its grammar, that of calls to its tools, or both.

    Raises InvalidField.
    """
    pool = state.tokenizer
    tools = job.prompt.tools
    own = None
    if job.grammar:  # beside tools too: an error shall name its field, and not `tools`
        own = await pool.compile(job.grammar)
    if not tools.tools:
        return own
    return await pool.compile(Grammar("tools", partial(tool_grammar, tools, pool.tool_format, job.grammar)))


def make_requests(
    call: ApiCall, job: Job, prompts: PromptTokens, constraint: Constraint | None
) -> list[Request]:
    """Returns the engine's requests of a job.

    For each prompt: one for its scores, if they are asked for, then one for each completion.
    Raises ApiError and InvalidField.
    """
    capacity = call.state.engine.capacity
    field = job.prompt.field
    ends = frozenset(job.sampling.stop_token_ids)
    if not job.ignores_eos:
        ends |= prompts.stop_token_ids
    requests: list[Request] = []
    for number, prompt in enumerate(prompts.tokens):
        room = capacity - len(prompt)
        if room < 0 or (room == 0 and job.n):
            raise context_overflow(len(prompt), capacity, field)
        if job.scores and len(prompt) > 1:
            requests.append(
                make_scored(
                    call, prompt[:1], prompt[1:], prompt_field=field, field=field, top=job.sampling.logprobs
                )
            )
        if job.n:
            sampling = dataclasses.replace(
                job.sampling,
                max_tokens=min(job.sampling.max_tokens, room),
                seed=(job.sampling.seed + number * job.n) % SEEDS,
                stop_token_ids=ends,
            )
            first = make_request(call, field, prompt, sampling, constraint, cache_salt=job.cache_salt)
            requests.append(first)
            for row in sampling.per_row(job.n)[1:]:  # each with its own seed
                requests.append(dataclasses.replace(first, sampling=row))
    return requests


def make_request(
    call: ApiCall,
    field: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    constraint: Constraint | None = None,
    *,
    embed: bool = False,
    cache_salt: str = "",
) -> Request:
    """Returns the engine's request for a prompt, in a field of the body.

    Raises ApiError if the adapter has been removed, and InvalidField as `check_request` does.
    """
    adapter = call.state.adapter_of(call.model)
    engine = call.state.engine
    namespace = call.http.state.namespace + cache_salt
    request = Request(tuple(prompt), sampling, namespace, constraint, embed, adapter)
    try:
        check_request(request, engine.cfg.vocab, engine.capacity)
    except InvalidField as error:
        if error.field == "prompt":
            raise InvalidField(field, str(error)) from None
        raise
    return request


def make_scored(
    call: ApiCall,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    prompt_field: str,
    field: str,
    top: int | None = 0,
) -> Request:
    """Returns the request for the log-probabilities of `tokens`, in a field of the body, after a prompt.

    `top`: how many probable tokens come beside each. Raises ApiError and InvalidField.
    """
    count = len(prompt) + len(tokens)
    capacity = call.state.engine.capacity
    vocab = call.state.engine.cfg.vocab
    if count > capacity:
        raise context_overflow(count, capacity, field, "prompt and answer have")
    check_ids(field, tokens, vocab)  # a mask has no bit for those above
    # The log-probabilities come from the program that samples, as those of a completion do.
    sampling = SamplingParams(max_tokens=len(tokens), temperature=0.0, logprobs=top)
    return make_request(call, prompt_field, prompt, sampling, ForcedTokens(tokens))
