"""Ollama's routes for embeddings: POST /api/embed and /api/embeddings."""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from stages.serve.api.embeddings import embed
from stages.serve.api.fields import prompt_texts
from stages.serve.api.generation import MAX_COMPLETIONS
from stages.serve.api.jobs import TextPrompts
from stages.serve.api.ollama import OllamaFields, reply_at_once
from stages.serve.api.requests import ApiCall
from stages.serve.api.writer import Usage
from stages.serve.bill import Bill


class EmbedRequest(OllamaFields, kw_only=True):
    """POST /api/embed.

    `truncate`, true by default: the end of a text that is longer than the context is left out.
    """

    input: str | Annotated[list[str], Meta(max_length=MAX_COMPLETIONS)] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None

    @property
    def choices(self) -> int:
        return len(self.input) if isinstance(self.input, list) else 1


class EmbedReply(msgspec.Struct, kw_only=True):
    """The embeddings of the texts, each of length 1. Durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    cost: Bill | UnsetType = UNSET


async def ollama_embed(call: ApiCall[EmbedRequest]) -> ASGIApp:
    """Texts as vectors, as Ollama has it."""
    body = call.body
    name = call.model.name
    if not body.input:
        return reply_at_once(call, EmbedReply(model=name, embeddings=[]))

    def reply(vectors: list[Any], usage: Usage) -> EmbedReply:
        embeddings = [vector.tolist() for vector in vectors]
        duration = round(usage.seconds * 1e9)
        return EmbedReply(
            model=name,
            embeddings=embeddings,
            total_duration=duration,
            prompt_eval_count=usage.prompt,
            cost=usage.cost,
        )

    prompts = TextPrompts("input", prompt_texts("input", body.input, MAX_COMPLETIONS))
    ignored = body.ignored_in(call.content)
    return await embed(call, prompts, reply, ignored, body.dimensions, truncate=body.truncate is not False)


class EmbeddingsPrompt(OllamaFields, kw_only=True):
    """POST /api/embeddings, the older form of /api/embed, for one text."""

    prompt: str | None = None


class EmbeddingsPromptReply(msgspec.Struct):
    embedding: list[float]
    cost: Bill | UnsetType = UNSET


async def ollama_embeddings(call: ApiCall[EmbeddingsPrompt]) -> ASGIApp:
    """A text as a vector, as Ollama had it first."""
    body = call.body
    if not body.prompt:
        return reply_at_once(call, EmbeddingsPromptReply([]))

    def reply(vectors: list[Any], usage: Usage) -> EmbeddingsPromptReply:
        return EmbeddingsPromptReply(vectors[0].tolist(), usage.cost)

    prompts = TextPrompts("prompt", [body.prompt])
    ignored = body.ignored_in(call.content)
    return await embed(call, prompts, reply, ignored, truncate=body.truncate is not False)
