"""What the server says of itself: its models, health, metrics, weights, routes and page; and adapters, which come and go."""

import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from stages.serve.api.completions import DefaultSampling
from stages.serve.api.requests import ModelRequest, json_reply
from stages.serve.errors import ApiError
from stages.serve.state import ServerState, Status


class ModelCard(msgspec.Struct, kw_only=True):
    """A served model. `root`: the base's name; `adapter`: the digest of the one on it, if any.

    `max_model_len`: tokens of prompt and completion together; `price_per_hour`: dollars.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "thrice"
    root: str
    adapter: str | None = None
    max_model_len: int
    price_per_hour: float | None = None
    default_sampling: DefaultSampling


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class AdapterRequest(ModelRequest, kw_only=True):
    """POST /v1/adapters. `folder`: the adapter's, from the server's folder for them. `name`: by which requests ask for it."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,64}$(?!\n)")]
    folder: Annotated[str, Meta(min_length=1, max_length=512)]


class AdapterReply(msgspec.Struct):
    id: str
    deleted: bool = True
    object: Literal["model"] = "model"


class Health(msgspec.Struct):
    """Whether requests are answered, or why not."""

    status: Status
    running: int
    waiting: int
    compiles_after_ready: int
    seconds_since_tick: float


class Live(msgspec.Struct):
    status: Literal["ok"] = "ok"


class Attestation(msgspec.Struct, kw_only=True):
    """One SHA-256 over all weights, at load and now."""

    object: Literal["attestation"] = "attestation"
    algorithm: Literal["sha256"] = "sha256"
    digest: str
    digest_at_load: str
    unchanged: bool
    loaded_at: int
    checked_at: int


async def models(state: ServerState, _: Request) -> Response:
    return json_reply(ModelList([model_card(state, name) for name in state.served_names]))


async def model(state: ServerState, http: Request) -> Response:
    return json_reply(model_card(state, state.find_model(http.path_params["model"]).name))


def model_card(state: ServerState, name: str) -> ModelCard:
    defaults = DefaultSampling(*(getattr(state.sampling, name) for name in DefaultSampling.__struct_fields__))
    return ModelCard(
        id=name,
        created=state.loaded_at,
        root=state.name,
        adapter=adapter.digest if (adapter := state.adapters.adapters.get(name)) else None,
        max_model_len=state.engine.capacity,
        price_per_hour=state.price,
        default_sampling=defaults,
    )


async def add_adapter(state: ServerState, _: Request, body: AdapterRequest) -> Response:
    if body.name in (*state.names, "default"):
        raise ApiError(409, f"{body.name} is the name of the model itself.", param="name")
    await state.adapters.add(body.name, body.folder)
    return json_reply(model_card(state, body.name))


async def remove_adapter(state: ServerState, http: Request) -> Response:
    state.adapters.remove(name := http.path_params["model"])
    return json_reply(AdapterReply(name))


async def health(state: ServerState, _: Request) -> Response:
    status, engine = state.status, state.engine
    reply = Health(
        status,
        engine.engine.running,
        engine.waiting,
        engine.compiles_after_ready,
        round(engine.seconds_since_tick, 3),
    )
    return json_reply(reply, 200 if status == "ok" else 503)


async def live(*_: object) -> Response:
    return json_reply(Live())


async def metrics(state: ServerState, _: Request) -> Response:
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def attestation(state: ServerState, _: Request) -> Response:
    now, then = await state.hash_weights(), state.digest
    reply = Attestation(
        digest=now, digest_at_load=then, unchanged=now == then, loaded_at=state.loaded_at, checked_at=int(time.time())
    )
    return json_reply(reply)


async def openapi(_: ServerState, http: Request) -> Response:
    return Response(http.app.openapi, media_type="application/json")


async def page(_: ServerState, http: Request) -> Response:
    html, policy = http.app.page
    return Response(html, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})
