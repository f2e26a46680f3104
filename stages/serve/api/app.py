"""Api: the ROUTES as an ASGI application, and as an OpenAPI document."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from stages.serve.api import anthropic, completions, embeddings, ollama, responses, score, status, tokens
from stages.serve.api.generation import check_ready
from stages.serve.api.requests import MAX_PROMPTS, TOKEN_ID, read_body
from stages.serve.errors import ApiError, ErrorReply
from stages.serve.page import page as make_page
from stages.serve.state import ServerState

PREFIXES = ("/v1/models/", "/v1/adapters/")  # before a model's name
BODY_ERRORS = (400, 404, 408, 413, 415, 429, 503)
ABOUT = "The routes of this server. Fields follow OpenAI's API, and vLLM's where OpenAI's has no name."
STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no key, or a wrong one.",
    403: "The Host or Origin is not one that may use this server.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    409: "Another adapter is in the way.",
    429: "All places are taken; Retry-After says how long to wait.",
    500: "The server is at fault.",
    503: "Requests are not answered at the moment.",
}
TEXT = {"type": "string", "minLength": 1}
array = lambda items, **bounds: {"type": "array", "minItems": 1, "items": items, **bounds}
json_body = lambda kind: {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


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


ROUTES = [
    Route("POST", "/v1/chat/completions", "createChatCompletion", "Answers a conversation.",
          completions.chat_completions, completions.ChatRequest, completions.ChatReply),
    Route("POST", "/v1/completions", "createCompletion", "Continues texts.", completions.completions,
          completions.CompletionRequest, completions.CompletionReply),
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
        self._state, self.page, self.openapi = state, make_page(), openapi_document(state.engine.cfg.vocab, version)
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


def openapi_document(vocab: int, version: str) -> bytes:
    """Returns OpenAPI 3.1 of the ROUTES as JSON, from the types that check the bodies of requests."""
    types = [kind for route in ROUTES for kind in (route.body, route.reply) if kind] + [ErrorReply, completions.ChatChunk]
    _, components = msgspec.json.schema_components(dict.fromkeys(types), ref_template="#/components/schemas/{name}")
    components["TokenId"] = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocab}
    texts = {"anyOf": [TEXT, array(TEXT, maxItems=MAX_PROMPTS), array(TOKEN_ID), array(array(TOKEN_ID), maxItems=MAX_PROMPTS)]}
    components["CompletionRequest"]["properties"]["prompt"] = components["EmbeddingsRequest"]["properties"]["input"] = texts
    components["ChatRequest"] |= {  # top_logprobs is a number only where logprobs is true
        "if": {"properties": {"top_logprobs": {"type": "integer"}}, "required": ["top_logprobs"]},
        "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    }
    components["TokenizeRequest"] |= {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        kind = "object" if route.media == "application/json" else "string"
        success = json_body(route.reply) if route.reply else {route.media: {"schema": {"type": kind}}}
        if route.streams:
            success["text/event-stream"] = {}  # `data:` lines of JSON, the last one `[DONE]`
        replies: dict[str, Any] = {"200": {"description": "Success.", "content": success}}
        for code in (*route.errors, *(BODY_ERRORS if route.body else ()), *((500,) if route.streams else ()), 401, 403):
            content = success if (route.path, code) == ("/health", 503) else json_body(ErrorReply)
            replies[str(code)] = {"description": STATUSES[code], "content": content}
        operation: dict[str, Any] = {"operationId": route.name, "summary": route.summary, "responses": replies}
        if route.body:
            operation["requestBody"] = {"required": True, "content": json_body(route.body)}
        if "{model" in route.path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": TEXT}]
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    keys = {"key": {"type": "http", "scheme": "bearer"}}
    openapi = {
        "openapi": "3.1.0",
        "info": {"title": "Thrice", "version": version, "description": ABOUT},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": keys},
        "security": [{}, {"key": []}],
    }
    return json.dumps(openapi, ensure_ascii=False).encode()
