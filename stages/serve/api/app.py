"""Api: the ROUTES as an ASGI application, and as an OpenAPI document."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from stages.serve.api import anthropic, completions, ollama, responses, status, texts
from stages.serve.api.generation import Answer, answer_reserved, check_ready
from stages.serve.api.requests import MAX_PROMPTS, TOKEN_ID, Call, json_reply
from stages.serve.errors import ApiError, error_type
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


@dataclasses.dataclass(frozen=True)
class Route:
    """One route. `handler` takes a Call; its signature has the types of body, if there is one, and of reply; its name, and the
    first line of its docstring, are those of the operation in the OpenAPI document.

    `errors`: statuses besides those that every route has, or every one with a body.
    """

    method: str
    path: str
    handler: Callable[..., Any]
    errors: tuple[int, ...] = ()
    media: str = "application/json"

    @functools.cached_property
    def body(self) -> Any:
        return next(iter(get_args(get_type_hints(self.handler).get("call"))), None)

    @property
    def reply(self) -> Any:
        """The type of a JSON reply, or None."""
        hint = get_type_hints(self.handler)["return"]
        (kind,) = get_args(hint) or (hint,)
        return kind if issubclass(kind, msgspec.Struct) else None

    @functools.cached_property
    def generates(self) -> bool:
        """Whether a place is reserved for each call, which asks something of the model."""
        return bool(self.body) and get_origin(get_type_hints(self.handler)["return"]) is Answer


ROUTES = [
    Route("POST", "/v1/chat/completions", completions.create_chat_completion),
    Route("POST", "/v1/completions", completions.create_completion),
    Route("POST", "/v1/responses", responses.create_response),
    Route("POST", "/v1/messages", anthropic.create_message),
    Route("POST", "/v1/messages/count_tokens", anthropic.count_tokens),
    Route("POST", "/api/chat", ollama.ollama_chat),
    Route("POST", "/api/generate", ollama.ollama_generate),
    Route("GET", "/api/tags", ollama.ollama_tags),
    Route("GET", "/api/ps", ollama.ollama_ps),
    Route("GET", "/api/version", ollama.ollama_version),
    Route("POST", "/api/show", ollama.ollama_show),
    Route("POST", "/api/pull", ollama.ollama_pull),
    Route("POST", "/api/embed", ollama.ollama_embed),
    Route("POST", "/api/embeddings", ollama.ollama_embeddings),
    Route("POST", "/v1/embeddings", texts.create_embedding),
    Route("POST", "/v1/score", texts.score),
    Route("POST", "/tokenize", texts.tokenize),
    Route("POST", "/detokenize", texts.detokenize),
    Route("GET", "/tokenizer_info", texts.tokenizer_info),
    Route("GET", "/v1/models", status.list_models),
    Route("GET", "/v1/models/{model}", status.retrieve_model, (404,)),
    Route("POST", "/v1/adapters", status.add_adapter, (409,)),
    Route("DELETE", "/v1/adapters/{model}", status.remove_adapter, (404,)),
    Route("GET", "/health", status.health, (503,)),
    Route("GET", "/live", status.live),
    Route("GET", "/version", status.version),
    Route("GET", "/metrics", status.metrics, media="text/plain"),
    Route("GET", "/v1/attestation", status.attest),
    Route("GET", "/openapi.json", status.openapi),
    Route("GET", "/", status.page, media="text/html"),
]


class Api:
    """The routes as an ASGI application, called with the path as the Guard has it. Raises ApiError, and what a handler does.

    `page` and `openapi`: the documents of those routes. `version`: this server's.
    """

    def __init__(self, state: ServerState, version: str, root_path: str = "") -> None:
        self._state = state
        self.page = make_page()
        self.version = version
        self.openapi = openapi_document(state.engine.cfg.vocab, version, root_path)
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
        response = await _respond(methods[method], Call(self._state, Request(scope, receive)))
        await response(scope, receive, send)


async def _respond(route: Route, call: Call) -> ASGIApp:
    if not route.body:
        reply = await route.handler(call)
    else:
        admission = call.state.admission
        check_ready(call) if route.generates else admission.check_open()
        try:
            await call.read(route.body)
            reply = await (answer_reserved(route.handler, call) if route.generates else route.handler(call))
        finally:
            admission.remove_bytes(len(call.content))
    return json_reply(reply) if isinstance(reply, msgspec.Struct) else reply


def openapi_document(vocab: int, version: str, root_path: str = "") -> bytes:
    """Returns OpenAPI 3.1 of the ROUTES below `root_path`, as JSON. It follows from the types that check requests' bodies."""
    types = [kind for route in ROUTES for kind in (route.body, route.reply, error_type(route.path)) if kind]
    types = [*dict.fromkeys(types), completions.ChatChunk]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for component in components.values():
        if component.get("additionalProperties") is False:  # of a body, where an unknown field may be null
            component["additionalProperties"] = {"type": "null"}
    components["TokenId"] = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocab}
    texts = {"anyOf": [TEXT, array(TEXT, maxItems=MAX_PROMPTS), array(TOKEN_ID), array(array(TOKEN_ID), maxItems=MAX_PROMPTS)]}
    components["CompletionRequest"]["properties"]["prompt"] = components["EmbeddingsRequest"]["properties"]["input"] = texts
    components["ChatRequest"] |= {  # top_logprobs is a number above 0 only where logprobs is true
        "if": {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]},
        "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    }
    components["TokenizeRequest"] |= {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        kind = "object" if route.media == "application/json" else "string"
        success = json_body(route.reply) if route.reply else {route.media: {"schema": {"type": kind}}}
        if streams := hasattr(route.body, "stream"):
            # `data:` lines of JSON, the last one `[DONE]`; Ollama's are JSON alone.
            success[ollama.OllamaWriter.media if route.path.startswith("/api/") else "text/event-stream"] = {}
        replies: dict[str, Any] = {"200": {"description": "Success.", "content": success}}
        for code in (*route.errors, *(BODY_ERRORS if route.body else ()), *((500,) if streams else ()), 401, 403):
            content = success if (route.path, code) == ("/health", 503) else json_body(error_type(route.path))
            replies[str(code)] = {"description": STATUSES[code], "content": content}
        summary = route.handler.__doc__ and route.handler.__doc__.partition("\n")[0]
        first, *others = route.handler.__name__.split("_")
        name = first + "".join(map(str.capitalize, others))  # as operations are named: createCompletion
        operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": replies}
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
    if root_path:
        openapi["servers"] = [{"url": root_path}]
    return json.dumps(openapi, ensure_ascii=False).encode()
