"""Makes the ASGI application from its ROUTES, of which the OpenAPI document is made too; has the short handlers."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stages.serve.api import openapi as schema
from stages.serve.api import replies
from stages.serve.api.completions import chat_completions, completions, encode_messages, json_reply
from stages.serve.api.guard import Guard
from stages.serve.api.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, read_body
from stages.serve.errors import ApiError
from stages.serve.page import page as make_page
from stages.serve.state import ServerState


async def models(state: ServerState, _: Request) -> Response:
    return json_reply(replies.ModelList([_card(state)]))


async def model(state: ServerState, http: Request) -> Response:
    state.check_model(http.path_params["model"])
    return json_reply(_card(state))


def _card(state: ServerState) -> replies.ModelCard:
    defaults = replies.DefaultSampling(*(getattr(state.sampling, name) for name in replies.DefaultSampling.__struct_fields__))
    return replies.ModelCard(
        id=state.name, created=state.loaded_at, root=state.name, max_model_len=state.engine.capacity,
        price_per_hour=state.price, default_sampling=defaults,
    )  # fmt: skip


async def tokenize(state: ServerState, http: Request) -> Response:
    state.admission.check_open()
    async with read_body(state, http, TokenizeRequest) as body:
        if (body.prompt is UNSET) == (body.messages is UNSET):
            raise ApiError(400, "Either prompt or messages is to be given.", param="prompt")
        if isinstance(body.messages, list):
            if body.add_special_tokens is not UNSET:
                message = "add_special_tokens is about a prompt; the special tokens of messages are those of the chat template."
                raise ApiError(400, message, param="add_special_tokens")
            tokens = await encode_messages(state, body.messages, body)
        else:
            if body.add_generation_prompt is not None or body.continue_final_message is not None:
                message = "add_generation_prompt and continue_final_message are about messages, not a prompt."
                raise ApiError(400, message, param="continue_final_message")
            (tokens,) = await state.tokenizer.encode([str(body.prompt)], special=body.add_special_tokens is not False)
    return json_reply(replies.TokenizeReply(len(tokens), state.engine.capacity, tokens))


async def detokenize(state: ServerState, http: Request) -> Response:
    state.admission.check_open()
    async with read_body(state, http, DetokenizeRequest) as body:
        if body.tokens and max(body.tokens) >= state.engine.cfg.vocab:
            raise ApiError(400, f"tokens holds an id outside the vocabulary of {state.engine.cfg.vocab:,}.", param="tokens")
        return json_reply(replies.DetokenizeReply(await state.tokenizer.decode(body.tokens)))


async def health(state: ServerState, _: Request) -> Response:
    status, engine = state.status, state.engine
    reply = replies.Health(
        status, engine.has_long_programs, engine.engine.running, engine.waiting, engine.compiles_after_ready,
        round(engine.seconds_since_tick, 3),
    )  # fmt: skip
    return json_reply(reply, 200 if status == "ok" else 503)


async def live(*_: object) -> Response:
    """Replies while the process runs, without a key."""
    return json_reply(replies.Live())


async def metrics(state: ServerState, _: Request) -> Response:
    """Replies in Prometheus's text format."""
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def attestation(state: ServerState, _: Request) -> Response:
    """Replies with the digest of the weights at load and now."""
    now, then = await state.hash_weights(), state.digest
    reply = replies.Attestation(
        digest=now, digest_at_load=then, unchanged=now == then, loaded_at=state.loaded_at, checked_at=int(time.time())
    )
    return json_reply(reply)


async def openapi(_: ServerState, http: Request) -> Response:
    return Response(http.app.openapi, media_type="application/json")


async def page(_: ServerState, http: Request) -> Response:
    html, policy = http.app.page
    return Response(html, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})


MODEL_PREFIX = "/v1/models/"
MODEL_PATH = MODEL_PREFIX + "{model}"
BODY_ERRORS = (400, 404, 408, 413, 415, 429, 503)


class Route(NamedTuple):
    """One route. `handler` takes the state and the request. `errors`: statuses besides those of every route.

    `body` and `reply`: Structs, None where there is no JSON.
    """

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
          ChatRequest, replies.ChatReply, (*BODY_ERRORS, 500), True),
    Route("POST", "/v1/completions", "createCompletion", "Continues texts.", completions,
          CompletionRequest, replies.CompletionReply, (*BODY_ERRORS, 500), True),
    Route("GET", "/v1/models", "listModels", "The model that is served.", models, reply=replies.ModelList),
    Route("GET", MODEL_PATH, "retrieveModel", "The model of that name.", model, reply=replies.ModelCard,
          errors=(404,)),
    Route("POST", "/tokenize", "tokenize", "The tokens of a text, or of a conversation.", tokenize,
          TokenizeRequest, replies.TokenizeReply, BODY_ERRORS),
    Route("POST", "/detokenize", "detokenize", "The text of tokens.", detokenize,
          DetokenizeRequest, replies.DetokenizeReply, BODY_ERRORS),
    Route("GET", "/health", "health", "Whether requests are answered.", health, reply=replies.Health, errors=(503,)),
    Route("GET", "/live", "live", "Whether the process runs.", live, reply=replies.Live),
    Route("GET", "/metrics", "metrics", "Counts and times, for Prometheus.", metrics, media="text/plain"),
    Route("GET", "/v1/attestation", "attest", "The digest of the weights, at load and now.", attestation,
          reply=replies.Attestation),
    Route("GET", "/openapi.json", "openapi", "This document.", openapi, media="application/json"),
    Route("GET", "/", "page", "A page to talk to the model.", page, media="text/html"),
]  # fmt: skip


class Api:
    """The routes as an ASGI application, called with the path as the Guard has it. Raises ApiError, and what a handler does.

    `page` and `openapi`: the documents of those routes.
    """

    def __init__(self, state: ServerState, version: str) -> None:
        self._state, self.page, self.openapi = state, make_page(), schema.document(ROUTES, state.engine.cfg.vocab, version)
        self._routes: dict[str, dict[str, Callable[..., Any]]] = {}
        for route in ROUTES:
            methods = self._routes.setdefault(route.path, {})
            methods |= dict.fromkeys(("GET", "HEAD") if route.method == "GET" else (route.method,), route.handler)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"], path, method = self, scope["state"]["path"], scope["method"]
        if path.startswith(MODEL_PREFIX):
            scope["path_params"], path = {"model": path.removeprefix(MODEL_PREFIX)}, MODEL_PATH
        methods = self._routes.get(path)
        if methods is None:
            raise ApiError(404, "There is no such route; /openapi.json lists them all.", code="not_found")
        if method not in methods:
            allowed = ", ".join(methods)
            message = f"{scope['path']} is not asked for with {method}, but with {allowed}."
            raise ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
        response = await methods[method](self._state, Request(scope, receive))
        await response(scope, receive, send)


def make_app(
    state: ServerState, keys: Sequence[str], hosts: frozenset[str] | None, origins: frozenset[str], version: str,
    log: str = "off",
) -> ASGIApp:  # fmt: skip
    """Returns the application that uvicorn runs; `keys`, `hosts`, `origins` and `log` are those of Guard."""
    return Guard(Api(state, version), keys, hosts, origins, log, state.metrics.count_response)
