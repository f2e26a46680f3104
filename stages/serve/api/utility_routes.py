"""The routes that generate nothing: models, tokens, health, metrics, attestation, the OpenAPI document, the page."""

import time

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from stages.serve.api.body import read_body
from stages.serve.api.chat import template_messages
from stages.serve.api.replies import Attestation, Health, Live, ModelCard, ModelList, Text, Tokens
from stages.serve.api.requests import DetokenizeRequest, TokenizeRequest
from stages.serve.errors import ApiError, json_reply
from stages.serve.state import ServerState


def _state(http: Request) -> ServerState:
    return http.app.state.server


def _card(state: ServerState) -> ModelCard:
    return ModelCard(
        id=state.name, created=state.loaded_at, root=state.name, max_model_len=state.engine.capacity, price_per_hour=state.price
    )


async def models(http: Request) -> Response:
    return json_reply(ModelList([_card(_state(http))]))


async def model(http: Request) -> Response:
    state = _state(http)
    state.check_model(http.path_params["model"])
    return json_reply(_card(state))


async def tokenize(http: Request) -> Response:
    state = _state(http)
    state.admission.check_open()
    body = await read_body(http, TokenizeRequest)
    if (body.prompt is UNSET) == (body.messages is UNSET):
        raise ApiError(400, "Either prompt or messages is to be given.", param="prompt")
    if isinstance(body.messages, list):
        if body.add_special_tokens is not UNSET:
            message = "add_special_tokens is about a prompt; the special tokens of messages are those of the chat template."
            raise ApiError(400, message, param="add_special_tokens")
        tokens = await state.tokenizer.encode_chat(template_messages(body.messages))
    else:
        (tokens,) = await state.tokenizer.encode([str(body.prompt)], special=body.add_special_tokens is not False)
    return json_reply(Tokens(len(tokens), state.engine.capacity, tokens))


async def detokenize(http: Request) -> Response:
    state = _state(http)
    state.admission.check_open()
    body = await read_body(http, DetokenizeRequest)
    if body.tokens and max(body.tokens) >= state.engine.cfg.vocab:
        raise ApiError(400, f"tokens holds an id outside the vocabulary of {state.engine.cfg.vocab:,}.", param="tokens")
    return json_reply(Text(await state.tokenizer.decode(body.tokens)))


async def health(http: Request) -> Response:
    state = _state(http)
    status, engine = state.status, state.engine
    reply = Health(status, engine.running, engine.waiting, engine.compiled, round(engine.idle_seconds, 3))
    return json_reply(reply, 200 if status == "ok" else 503)


async def live(_: Request) -> Response:
    return json_reply(Live())


async def metrics(http: Request) -> Response:
    return Response(_state(http).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def attestation(http: Request) -> Response:
    state = _state(http)
    now = await state.hash_weights()
    return json_reply(
        Attestation(
            digest=now, digest_at_load=state.digest, unchanged=now == state.digest, loaded_at=state.loaded_at,
            checked_at=int(time.time()),
        )
    )  # fmt: skip


async def openapi(http: Request) -> Response:
    return Response(http.app.state.openapi, media_type="application/json")


async def page(http: Request) -> Response:
    html, policy = http.app.state.page
    return Response(html, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})
