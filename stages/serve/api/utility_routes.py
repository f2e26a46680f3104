"""The routes that generate nothing: models, tokens, health, metrics, attestation, the page."""

from msgspec import UnsetType
from starlette.requests import Request
from starlette.responses import Response

from stages.serve.api.body import read
from stages.serve.api.chat import conversation
from stages.serve.api.reply_schema import Live, ModelCard, ModelList, Text, Tokens
from stages.serve.api.request_schema import DetokenizeRequest, TokenizeRequest
from stages.serve.errors import Refused, json_reply
from stages.serve.state import Served


def _served(request: Request) -> Served:
    return request.app.state.served


def _card(served: Served) -> ModelCard:
    return ModelCard(
        id=served.name, created=served.loaded_at, root=served.name, max_model_len=served.engine.capacity,
        price_per_hour=served.price,
    )  # fmt: skip


async def models(request: Request) -> Response:
    return json_reply(ModelList([_card(_served(request))]))


async def model(request: Request) -> Response:
    served = _served(request)
    served.check_model(request.path_params["model"])
    return json_reply(_card(served))


async def tokenize(request: Request) -> Response:
    served = _served(request)
    served.check_open()
    body = await read(request, TokenizeRequest)
    served.check_model(body.model)
    if isinstance(body.prompt, UnsetType) == isinstance(body.messages, UnsetType):
        raise Refused(400, "Either prompt or messages is to be given.", param="prompt")
    if not isinstance(body.messages, UnsetType):
        if not isinstance(body.add_special_tokens, UnsetType):
            said = "add_special_tokens is about a prompt; the special tokens of messages are those of the chat template."
            raise Refused(400, said, param="add_special_tokens")
        tokens = await served.prompts.of_chat(conversation(body.messages))
    else:
        special = isinstance(body.add_special_tokens, UnsetType) or body.add_special_tokens
        (tokens,) = await served.prompts.of_texts([str(body.prompt)], special)
    return json_reply(Tokens(len(tokens), served.engine.capacity, tokens))


async def detokenize(request: Request) -> Response:
    served = _served(request)
    served.check_open()
    body = await read(request, DetokenizeRequest)
    served.check_model(body.model)
    if body.tokens and max(body.tokens) >= served.engine.cfg.vocab:
        raise Refused(400, f"tokens holds an id outside the vocabulary of {served.engine.cfg.vocab:,}.", param="tokens")
    return json_reply(Text(await served.prompts.to_text(body.tokens)))


async def health(request: Request) -> Response:
    told = _served(request).health()
    return json_reply(told, 200 if told.status == "ok" else 503)


async def live(_: Request) -> Response:
    return json_reply(Live())


async def metrics(request: Request) -> Response:
    return Response(_served(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def attestation(request: Request) -> Response:
    return json_reply(await _served(request).attest())


async def openapi(request: Request) -> Response:
    return Response(request.app.state.openapi, media_type="application/json")


async def page(request: Request) -> Response:
    document, policy = request.app.state.page
    return Response(document, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})
