"""Api: the ROUTES as an ASGI application, and as an OpenAPI document."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import InvalidField
from stages.serve.admission import Sender
from stages.serve.api import anthropic, completions, ollama, responses, status, texts
from stages.serve.api.generation import MAX_COMPLETIONS
from stages.serve.api.requests import (
    INLINE_BYTES,
    MAX_PROMPTS,
    TOKEN_ID,
    ApiCall,
    ModelRequest,
    content_length,
    json_reply,
)
from stages.serve.errors import ApiError, ClientGone, reply_class
from stages.serve.page import page as make_page
from stages.serve.state import ServerState

SEND_SECONDS = 60.0  # for a client to read what it was sent
PREFIXES = ("/v1/models/", "/v1/adapters/")  # before a model's name
# Why paths are not here that clients of Ollama and Anthropic ask for, with all below them.
ABSENT = {
    **dict.fromkeys(
        ("/api/create", "/api/copy", "/api/delete", "/api/push", "/api/blobs"),
        "Models are only served here: no request makes, copies, sends or deletes one.",
    ),
    "/v1/messages/batches": "There are no batches: send each message by itself, several at once.",
    "/v1/files": "No files are kept: send their text in the messages.",
    **dict.fromkeys(
        ("/v1/agents", "/v1/environments", "/v1/sessions"),
        "No agents run here: an agent of your own sends its messages.",
    ),
}
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
        completions.create_chat_completion,
        completions.ChatRequest,
        completions.ChatReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/completions",
        completions.create_completion,
        completions.CompletionRequest,
        completions.CompletionReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/responses",
        responses.create_response,
        responses.ResponseRequest,
        responses.ResponseReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/responses/input_tokens",
        responses.count_input_tokens,
        responses.ResponseRequest,
        responses.InputTokensReply,
    ),
    Route(
        "POST",
        "/v1/messages",
        anthropic.create_message,
        anthropic.MessagesRequest,
        anthropic.MessageReply,
        reserves=True,
        stream=EVENT_STREAM,
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        anthropic.count_tokens,
        anthropic.CountTokensRequest,
        anthropic.CountTokensReply,
    ),
    Route(
        "POST",
        "/api/chat",
        ollama.ollama_chat,
        ollama.OllamaChatRequest,
        ollama.OllamaReply,
        reserves=True,
        stream=JSON_LINES,
    ),
    Route(
        "POST",
        "/api/generate",
        ollama.ollama_generate,
        ollama.OllamaGenerateRequest,
        ollama.OllamaReply,
        reserves=True,
        stream=JSON_LINES,
    ),
    Route("GET", "/api/tags", ollama.ollama_tags, reply=ollama.Tags),
    Route("GET", "/api/ps", ollama.ollama_ps, reply=ollama.Tags),
    Route("GET", "/api/version", ollama.ollama_version, reply=ollama.Version),
    Route("POST", "/api/show", ollama.ollama_show, ollama.ShowRequest, ollama.Show),
    Route("POST", "/api/pull", ollama.ollama_pull, ollama.PullRequest, ollama.PullReply, stream=JSON_LINES),
    Route("POST", "/api/embed", ollama.ollama_embed, ollama.EmbedRequest, ollama.EmbedReply, reserves=True),
    Route(
        "POST",
        "/api/embeddings",
        ollama.ollama_embeddings,
        ollama.EmbeddingsPrompt,
        ollama.EmbeddingsPromptReply,
        reserves=True,
    ),
    Route(
        "POST",
        "/v1/embeddings",
        texts.create_embedding,
        texts.EmbeddingsRequest,
        texts.EmbeddingsReply,
        reserves=True,
    ),
    Route("POST", "/v1/score", texts.score, texts.ScoreRequest, texts.ScoreReply, reserves=True),
    Route("POST", "/tokenize", texts.tokenize, texts.TokenizeRequest, texts.TokenizeReply),
    Route("POST", "/detokenize", texts.detokenize, texts.DetokenizeRequest, texts.DetokenizeReply),
    Route("GET", "/tokenizer_info", texts.tokenizer_info, reply=texts.TokenizerInfo),
    Route("GET", "/v1/models", status.list_models, reply=status.ModelList),
    Route("GET", "/v1/models/{model}", status.retrieve_model, reply=status.ModelCard, errors=(404,)),
    Route("POST", "/v1/adapters", status.add_adapter, status.AdapterRequest, status.ModelCard, errors=(409,)),
    Route("DELETE", "/v1/adapters/{model}", status.remove_adapter, reply=status.AdapterReply, errors=(404,)),
    Route("GET", "/health", status.health, reply=status.Health, errors=(503,)),
    Route("GET", "/live", status.live, reply=status.Live),
    Route("GET", "/version", status.version, reply=status.ServerVersion),
    Route("GET", "/metrics", status.metrics, media="text/plain"),
    Route("GET", "/v1/attestation", status.attest, reply=status.Attestation),
    Route("GET", "/openapi.json", status.openapi),
    Route("GET", "/", status.page, media="text/html"),
]


class Api:
    """The routes as an ASGI application, called with the path as the Guard has it.

    Raises ApiError, and what a handler does.

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
            methods[route.method] = route
            if route.method == "GET":
                methods["HEAD"] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        route = self._find(scope)
        call: ApiCall[Any] = ApiCall(self._state, Request(scope, receive))
        if route.body is None:
            response = _response(await route.handler(call))
            await response(scope, receive, send)
            return
        self._check_open(route, call)
        with contextlib.ExitStack() as until_tokens:
            until_tokens.callback(call.uncount_bytes)
            await call.read(route.body)
            with self._place(route, call):
                response = _response(await route.handler(call))
                until_tokens.close()
                del call.body, call.content  # their text has become tokens; a writer may hold the body on
                await response(scope, receive, _in_time(send))

    def _find(self, scope: Scope) -> Route:
        """Returns the route of a request, and takes a model's name out of its path. Raises ApiError."""
        path = scope["state"]["path"]
        method = scope["method"]
        for prefix in PREFIXES:
            if path.startswith(prefix):
                scope["path_params"] = {"model": path.removeprefix(prefix)}
                path = prefix + "{model}"
        methods = self._routes.get(path)
        if methods is None:
            message = f"There is no route {path!r:.80} here; /openapi.json lists them all."
            for absent, why in ABSENT.items():
                if path == absent or path.startswith(f"{absent}/"):
                    message += f" {why}"
            raise ApiError(404, message, code="not_found")
        if method not in methods:
            allowed = ", ".join(methods)
            message = f"{scope['path']} is not asked for with {method}, but with {allowed}."
            raise ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
        return methods[method]

    def _check_open(self, route: Route, call: ApiCall) -> None:
        """Raises ApiError for a call that can get no place: 503 when not ready, 429 for a large body.

        A small body is read first: it says how many completions are asked for, by which a request
        is told from others.
        """
        if not route.reserves:
            self._state.admission.check_open()
            return
        self._state.check_ready()
        if content_length(call.http) > INLINE_BYTES:
            self._state.admission.check(_sender(call, 0), time.monotonic(), _tries(call))

    @contextlib.contextmanager
    def _place(self, route: Route, call: ApiCall) -> Iterator[None]:
        """Holds a place for the call, if its route reserves one.

        Raises ApiError without one, and InvalidField.
        """
        if not route.reserves:
            yield
            return
        choices = call.body.choices
        if choices > MAX_COMPLETIONS:
            limit = f"at most {MAX_COMPLETIONS} are made for one request"
            message = f"prompts times n are {choices:,} completions; {limit}."
            raise InvalidField("n", message)
        admission = self._state.admission
        with admission.place(_sender(call, choices), time.monotonic(), _tries(call)) as place:
            call.place = place
            yield


def _response(reply: msgspec.Struct | ASGIApp) -> ASGIApp:
    return json_reply(reply) if isinstance(reply, msgspec.Struct) else reply


def _in_time(send: Send) -> Send:
    """Returns `send`, which raises ClientGone for a client that reads nothing: it would keep its place."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientGone from None

    return send_in_time


def _sender(call: ApiCall, choices: int) -> Sender:
    """Returns who sends a request, and its size: its bytes if they are many, else its completions."""
    address, port = call.http.client or ("", 0)
    length = content_length(call.http)
    size = choices
    if length > INLINE_BYTES:
        size = length
    return Sender(port, (address, call.http.state.namespace, size))


def _tries(call: ApiCall) -> int | None:
    """Returns how often the clients of OpenAI and Anthropic say that they have sent a request before."""
    count = call.http.headers.get("x-stainless-retry-count", "")
    return int(count) if count.isdecimal() and len(count) < 4 else None


def json_body(kind: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def some(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items, **bounds}


def openapi_document(vocab: int, version: str, root_path: str = "") -> bytes:
    """Returns OpenAPI 3.1 of the ROUTES below `root_path`, as JSON.

    It follows from the types that check requests' bodies.
    """
    types: list[Any] = []
    for route in ROUTES:
        types += [route.body, route.reply, reply_class(route.path)]
    types = [*dict.fromkeys(filter(None, types)), completions.ChatChunk]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for component in components.values():
        if component.get("additionalProperties") is False:  # of a body, where an unknown field may be null
            component["additionalProperties"] = {"type": "null"}
    components["TokenId"] = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocab}
    several = [some(TEXT, maxItems=MAX_PROMPTS), some(TOKEN_ID), some(some(TOKEN_ID), maxItems=MAX_PROMPTS)]
    prompts = {"anyOf": [TEXT, *several]}
    components["CompletionRequest"]["properties"]["prompt"] = prompts
    components["EmbeddingsRequest"]["properties"]["input"] = prompts
    components["ChatRequest"] |= {  # top_logprobs is a number above 0 only where logprobs is true
        "if": {
            "properties": {"top_logprobs": {"type": "integer", "minimum": 1}},
            "required": ["top_logprobs"],
        },
        "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    }
    components["TokenizeRequest"] |= {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
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


def _operation(route: Route) -> dict[str, Any]:
    """Returns what the OpenAPI document says of a route."""
    summary = route.handler.__doc__ and route.handler.__doc__.partition("\n")[0]
    first, *others = route.handler.__name__.split("_")
    name = first + "".join(map(str.capitalize, others))  # as operations are named: createCompletion
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": _replies(route)}
    if route.body:
        operation["requestBody"] = {"required": True, "content": json_body(route.body)}
    if "{model" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": TEXT}]
    return operation


def _replies(route: Route) -> dict[str, Any]:
    """Returns the replies to a route's requests, by their status."""
    success: dict[str, Any] = {}
    if route.reply:
        success = json_body(route.reply)
    elif route.media == "application/json":
        success[route.media] = {"schema": {"type": "object"}}
    else:
        success[route.media] = {"schema": {"type": "string"}}
    if route.stream:
        success[route.stream] = {}
    codes = [*route.errors]
    if route.body:
        codes += BODY_ERRORS
    if route.stream:
        codes.append(500)
    replies: dict[str, Any] = {"200": {"description": "Success.", "content": success}}
    for code in (*codes, 401, 403):
        content = json_body(reply_class(route.path))
        if route.path == "/health" and code == 503:
            content = success
        replies[str(code)] = {"description": STATUSES[code], "content": content}
    return replies
