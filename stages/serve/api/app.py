"""Api: the ROUTES as an ASGI application, of which the OpenAPI document is made too."""

from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from stages.serve.api import anthropic, embeddings, ollama, responses, score, status, tokens
from stages.serve.api import openapi as schema
from stages.serve.api.completions import (
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    chat_completions,
    completions,
)
from stages.serve.api.generation import check_ready
from stages.serve.api.requests import read_body
from stages.serve.errors import ApiError
from stages.serve.page import page as make_page
from stages.serve.state import ServerState

PREFIXES = ("/v1/models/", "/v1/adapters/")  # before a model's name
BODY_ERRORS = (400, 404, 408, 413, 415, 429, 503)


class Route(NamedTuple):
    """One route. `handler` takes the state, the request and, if there is a `body`, that body, read as its type.

    `reply`: the type of a JSON reply. `errors`: statuses besides those that every route has, or every one with a body.
    """

    method: str
    path: str
    name: str
    summary: str
    handler: Callable[..., Any]
    body: Any = None
    reply: Any = None
    errors: tuple[int, ...] = ()
    media: str = "application/json"

    @property
    def streams(self) -> bool:
        """Whether it makes completions, streamed or whole."""
        return hasattr(self.body, "stream")

    @property
    def statuses(self) -> tuple[int, ...]:
        return (*self.errors, *(BODY_ERRORS if self.body else ()), *((500,) if self.streams else ()), 401, 403)


ROUTES = [
    Route("POST", "/v1/chat/completions", "createChatCompletion", "Answers a conversation.", chat_completions,
          ChatRequest, ChatReply),
    Route("POST", "/v1/completions", "createCompletion", "Continues texts.", completions,
          CompletionRequest, CompletionReply),
    Route("POST", "/v1/responses", "createResponse", "Answers a conversation, as events or whole.", responses.responses,
          responses.ResponseRequest, responses.ResponseReply),
    Route("POST", "/v1/messages", "createMessage", "Answers a conversation, as Anthropic has it.", anthropic.messages,
          anthropic.MessagesRequest, anthropic.MessageReply),
    Route("POST", "/v1/messages/count_tokens", "countTokens", "The tokens of a conversation.", anthropic.count_tokens,
          anthropic.CountTokensRequest, anthropic.CountTokensReply),
    Route("POST", "/api/chat", "ollamaChat", "Answers a conversation, as Ollama has it.", ollama.chat,
          ollama.OllamaChatRequest, ollama.OllamaReply),
    Route("POST", "/api/generate", "ollamaGenerate", "Answers or continues a prompt, as Ollama has it.", ollama.generate_text,
          ollama.OllamaGenerateRequest, ollama.OllamaReply),
    Route("GET", "/api/tags", "ollamaTags", "The model that is served, as Ollama has it.", ollama.tags, reply=ollama.Tags),
    Route("GET", "/api/ps", "ollamaPs", "The model that is served: it is loaded.", ollama.tags, reply=ollama.Tags),
    Route("GET", "/api/version", "ollamaVersion", "A version of Ollama that has what is here.", ollama.version,
          reply=ollama.Version),
    Route("POST", "/api/show", "ollamaShow", "What a model is and can do.", ollama.show, ollama.ShowRequest, ollama.Show),
    Route("POST", "/v1/embeddings", "createEmbedding", "Texts as vectors.", embeddings.embeddings,
          embeddings.EmbeddingsRequest, embeddings.EmbeddingsReply),
    Route("POST", "/v1/score", "score", "How probable given answers are.", score.score, score.ScoreRequest, score.ScoreReply),
    Route("POST", "/tokenize", "tokenize", "The tokens of a text, or of a conversation.", tokens.tokenize,
          tokens.TokenizeRequest, tokens.TokenizeReply),
    Route("POST", "/detokenize", "detokenize", "The text of tokens.", tokens.detokenize,
          tokens.DetokenizeRequest, tokens.DetokenizeReply),
    Route("GET", "/tokenizer_info", "tokenizerInfo", "The names of special tokens, and the chat template.",
          tokens.tokenizer_info, reply=tokens.TokenizerInfo),
    Route("GET", "/v1/models", "listModels", "The model that is served.", status.models, reply=status.ModelList),
    Route("GET", "/v1/models/{model}", "retrieveModel", "The model of that name.", status.model, reply=status.ModelCard,
          errors=(404,)),
    Route("POST", "/v1/adapters", "addAdapter", "Adds an adapter, which requests may then name as their model.",
          status.add_adapter, status.AdapterRequest, status.ModelCard, errors=(409,)),
    Route("DELETE", "/v1/adapters/{model}", "removeAdapter", "Removes an adapter; requests under way go on with it.",
          status.remove_adapter, reply=status.AdapterReply, errors=(404,)),
    Route("GET", "/health", "health", "Whether requests are answered.", status.health, reply=status.Health, errors=(503,)),
    Route("GET", "/live", "live", "Whether the process runs.", status.live, reply=status.Live),
    Route("GET", "/metrics", "metrics", "Counts and times, for Prometheus.", status.metrics, media="text/plain"),
    Route("GET", "/v1/attestation", "attest", "The digest of the weights, at load and now.", status.attestation,
          reply=status.Attestation),
    Route("GET", "/openapi.json", "openapi", "This document.", status.openapi),
    Route("GET", "/", "page", "A page to talk to the model.", status.page, media="text/html"),
]  # fmt: skip


class Api:
    """The routes as an ASGI application, called with the path as the Guard has it. Raises ApiError, and what a handler does.

    `page` and `openapi`: the documents of those routes.
    """

    def __init__(self, state: ServerState, version: str) -> None:
        self._state, self.page, self.openapi = state, make_page(), schema.document(ROUTES, state.engine.cfg.vocab, version)
        self._routes: dict[str, dict[str, Route]] = {}
        for route in ROUTES:
            methods = self._routes.setdefault(route.path, {})
            methods |= dict.fromkeys(("GET", "HEAD") if route.method == "GET" else (route.method,), route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"], path, method = self, scope["state"]["path"], scope["method"]
        for prefix in PREFIXES:
            if path.startswith(prefix):
                scope["path_params"], path = {"model": path.removeprefix(prefix)}, prefix + "{model}"
        methods = self._routes.get(path)
        if methods is None:
            raise ApiError(404, f"There is no route {path!r:.80} here; /openapi.json lists them all.", code="not_found")
        if method not in methods:
            allowed = ", ".join(methods)
            message = f"{scope['path']} is not asked for with {method}, but with {allowed}."
            raise ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
        response = await self._respond(methods[method], Request(scope, receive))
        await response(scope, receive, send)

    async def _respond(self, route: Route, http: Request) -> ASGIApp:
        state = self._state
        if not route.body:
            return await route.handler(state, http)
        if route.streams:
            check_ready(state, http)
        else:
            state.admission.check_open()
        async with read_body(state, http, route.body) as body:
            return await route.handler(state, http, body)
