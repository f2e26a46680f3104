"""ROUTES: the table of all routes, each with its handler and the types of its body and its reply."""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import ASGIApp

from stages.serve.api import (
    anthropic,
    chat,
    completions,
    embeddings,
    ollama,
    ollama_embed,
    ollama_models,
    responses,
    score,
    status,
    tokens,
)
from stages.serve.api.fields import ModelRequest
from stages.serve.api.requests import ApiCall
from stages.serve.page import LIBRARIES

EVENT_STREAM = "text/event-stream"  # `data:` lines of JSON, OpenAI's last one `[DONE]`
JSON_LINES = ollama.OllamaWriter.media  # of JSON alone


@dataclasses.dataclass(frozen=True)
class Route:
    """One route: what it takes, what answers it, and what the OpenAPI document says of it."""

    method: str
    path: str
    # Returns the reply, or a response. Its name and the first line of its docstring are those of
    # the operation.
    handler: Callable[[ApiCall[Any]], Awaitable[msgspec.Struct | ASGIApp]]
    # The types of the JSON body and of the JSON reply, where there are such.
    body: type[ModelRequest] | None = None
    reply: type[msgspec.Struct] | None = None
    # Whether a call asks something of the model, and takes a place for it; the body is an
    # AnswerRequest then.
    reserves: bool = False
    # The media type of the stream for which a body may ask.
    stream: str = ""
    # Statuses besides those that every route has, or every one with a body.
    errors: tuple[int, ...] = ()
    # The media type of the reply.
    media: str = "application/json"


ROUTES = [
    Route(
        "POST",
        "/v1/chat/completions",
        chat.create_chat_completion,
        body=chat.ChatRequest,
        reply=chat.ChatReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/completions",
        completions.create_completion,
        body=completions.CompletionRequest,
        reply=completions.CompletionReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/responses",
        responses.create_response,
        body=responses.ResponseRequest,
        reply=responses.ResponseReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/responses/input_tokens",
        responses.count_input_tokens,
        body=responses.ResponseRequest,
        reply=responses.InputTokensReply,
    ),
    Route(
        "POST",
        "/v1/messages",
        anthropic.create_message,
        body=anthropic.MessagesRequest,
        reply=anthropic.MessageReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        anthropic.count_tokens,
        body=anthropic.CountTokensRequest,
        reply=anthropic.CountTokensReply,
    ),
    Route(
        "POST",
        "/api/chat",
        ollama.ollama_chat,
        body=ollama.OllamaChatRequest,
        reply=ollama.OllamaReply,
        reserves=True,
        stream=JSON_LINES,
    ),
    Route(
        "POST",
        "/api/generate",
        ollama.ollama_generate,
        body=ollama.OllamaGenerateRequest,
        reply=ollama.OllamaReply,
        reserves=True,
        stream=JSON_LINES,
    ),
    Route("GET", "/api/tags", ollama_models.ollama_tags, reply=ollama_models.Tags),
    Route("GET", "/api/ps", ollama_models.ollama_ps, reply=ollama_models.Tags),
    Route("GET", "/api/version", ollama_models.ollama_version, reply=ollama_models.Version),
    Route(
        "POST",
        "/api/show",
        ollama_models.ollama_show,
        body=ollama_models.ShowRequest,
        reply=ollama_models.Show,
    ),
    Route(
        "POST",
        "/api/pull",
        ollama_models.ollama_pull,
        body=ollama_models.PullRequest,
        reply=ollama_models.PullReply,
        stream=JSON_LINES,
    ),
    Route(
        "POST",
        "/api/embed",
        ollama_embed.ollama_embed,
        body=ollama_embed.EmbedRequest,
        reply=ollama_embed.EmbedReply,
        reserves=True,
    ),
    Route(
        "POST",
        "/api/embeddings",
        ollama_embed.ollama_embeddings,
        body=ollama_embed.EmbeddingsPrompt,
        reply=ollama_embed.EmbeddingsPromptReply,
        reserves=True,
    ),
    Route(
        "POST",
        "/v1/embeddings",
        embeddings.create_embedding,
        body=embeddings.EmbeddingsRequest,
        reply=embeddings.EmbeddingsReply,
        reserves=True,
    ),
    Route("POST", "/v1/score", score.score, body=score.ScoreRequest, reply=score.ScoreReply, reserves=True),
    Route("POST", "/tokenize", tokens.tokenize, body=tokens.TokenizeRequest, reply=tokens.TokenizeReply),
    Route(
        "POST", "/detokenize", tokens.detokenize, body=tokens.DetokenizeRequest, reply=tokens.DetokenizeReply
    ),
    Route("GET", "/tokenizer_info", tokens.tokenizer_info, reply=tokens.TokenizerInfo),
    Route("GET", "/v1/models", status.list_models, reply=status.ModelList),
    Route("GET", "/v1/models/{model}", status.retrieve_model, reply=status.ModelCard, errors=(404,)),
    Route(
        "POST",
        "/v1/adapters",
        status.add_adapter,
        body=status.AdapterRequest,
        reply=status.ModelCard,
        errors=(409,),
    ),
    Route("DELETE", "/v1/adapters/{model}", status.remove_adapter, reply=status.AdapterReply, errors=(404,)),
    Route("GET", "/health", status.health, reply=status.Health, errors=(503,)),
    Route("GET", "/live", status.live, reply=status.Live),
    Route("GET", "/version", status.version, reply=status.ServerVersion),
    Route("GET", "/metrics", status.metrics, media="text/plain"),
    Route("GET", "/v1/attestation", status.attest, reply=status.Attestation),
    Route("GET", "/openapi.json", status.openapi),
    Route("GET", "/", status.page, media="text/html"),
    *(Route("GET", f"/page/{name}", status.library, media="text/javascript") for name in LIBRARIES),
]
