"""ROUTES: one table of all routes, from which the application and its OpenAPI document are made."""

from collections.abc import Callable
from typing import Any, NamedTuple

from stages.serve.api import utility_routes as utility
from stages.serve.api.chat import chat_completions
from stages.serve.api.completions import completions
from stages.serve.api.replies import Attestation, ChatReply, Health, Live, ModelCard, ModelList, Text, TextReply, Tokens
from stages.serve.api.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

BODY = (400, 404, 408, 413, 415, 429, 503)


class Route(NamedTuple):
    """`body` and `reply`: Structs, None where there is no JSON. `errors`: statuses besides those that every route has."""

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[..., Any]
    body: Any = None
    reply: Any = None
    errors: tuple[int, ...] = ()
    streams: bool = False
    media: str = "application/json"


ROUTES = [
    Route("POST", "/v1/chat/completions", "createChatCompletion", "Answers a conversation.", chat_completions,
          ChatRequest, ChatReply, (*BODY, 500), True),
    Route("POST", "/v1/completions", "createCompletion", "Continues texts.", completions, CompletionRequest, TextReply,
          (*BODY, 500), True),
    Route("GET", "/v1/models", "listModels", "The model that is served.", utility.models, reply=ModelList),
    Route("GET", "/v1/models/{model:path}", "retrieveModel", "The model of that name.", utility.model, reply=ModelCard,
          errors=(404,)),
    Route("POST", "/tokenize", "tokenize", "The tokens of a text, or of a conversation.", utility.tokenize, TokenizeRequest,
          Tokens, BODY),
    Route("POST", "/detokenize", "detokenize", "The text of tokens.", utility.detokenize, DetokenizeRequest, Text, BODY),
    Route("GET", "/health", "health", "Whether requests are answered.", utility.health, reply=Health, errors=(503,)),
    Route("GET", "/live", "live", "That the process runs.", utility.live, reply=Live),
    Route("GET", "/metrics", "metrics", "Counts and times, for Prometheus.", utility.metrics, media="text/plain"),
    Route("GET", "/v1/attestation", "attest", "The digest of the weights, at load and now.", utility.attestation,
          reply=Attestation),
    Route("GET", "/openapi.json", "openapi", "This document.", utility.openapi, media="application/json"),
    Route("GET", "/", "page", "A page to talk to the model.", utility.page, media="text/html"),
]  # fmt: skip
