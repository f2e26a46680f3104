"""All routes in one table: what each is called by, asks for, and replies. The application and its OpenAPI are made from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from stages.serve.api import utility_routes as plain
from stages.serve.api.chat import chat
from stages.serve.api.completions import completions
from stages.serve.api.reply_schema import Attestation, ChatReply, Health, Live, ModelCard, ModelList, Text, TextReply, Tokens
from stages.serve.api.request_schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

BODY = (400, 404, 408, 413, 415, 429, 503)


class Route(NamedTuple):
    """`asks` and `replies`: Structs, None where there is no JSON. `refuses`: statuses besides those every route has."""

    method: str
    path: str
    name: str
    about: str
    handler: Callable[..., Any]
    asks: Any = None
    replies: Any = None
    refuses: tuple[int, ...] = ()
    streams: bool = False
    media: str = "application/json"


ROUTES = [
    Route("POST", "/v1/chat/completions", "createChatCompletion", "Answers a conversation.", chat, ChatRequest, ChatReply,
          (*BODY, 500), True),
    Route("POST", "/v1/completions", "createCompletion", "Continues texts.", completions, CompletionRequest, TextReply,
          (*BODY, 500), True),
    Route("GET", "/v1/models", "listModels", "The model that is served.", plain.models, replies=ModelList),
    Route("GET", "/v1/models/{model:path}", "retrieveModel", "The model of that name.", plain.model, replies=ModelCard,
          refuses=(404,)),
    Route("POST", "/tokenize", "tokenize", "The tokens of a text, or of a conversation.", plain.tokenize, TokenizeRequest,
          Tokens, BODY),
    Route("POST", "/detokenize", "detokenize", "The text of tokens.", plain.detokenize, DetokenizeRequest, Text, BODY),
    Route("GET", "/health", "health", "Whether requests are answered.", plain.health, replies=Health, refuses=(503,)),
    Route("GET", "/live", "live", "That the process runs.", plain.live, replies=Live),
    Route("GET", "/metrics", "metrics", "Counts and times, for Prometheus.", plain.metrics, media="text/plain"),
    Route("GET", "/v1/attestation", "attest", "The digest of the weights, at load and now.", plain.attestation,
          replies=Attestation),
    Route("GET", "/openapi.json", "openapi", "This document.", plain.openapi, media="application/json"),
    Route("GET", "/", "page", "A page to talk to the model.", plain.page, media="text/html"),
]  # fmt: skip
