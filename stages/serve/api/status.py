"""The server's models, health, metrics, weights, routes and page; and adapters, which come and go."""

import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.responses import Response

from stages.cli.flags import PLAIN_NAME
from stages.serve.api.anthropic_models import anthropic_model, anthropic_models
from stages.serve.api.fields import ModelRequest
from stages.serve.api.requests import ApiCall, json_reply
from stages.serve.engine_thread import Wait
from stages.serve.errors import ApiError
from stages.serve.page import library as library_of_page
from stages.serve.state import ServerState, Status

ANTHROPIC_HEADER = "anthropic-version"  # in each request of Anthropic's clients


class DefaultSampling(msgspec.Struct):
    """The sampling of a request that leaves these fields out.

    They have the same name and meaning in SamplingParams.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float


class ModelCard(msgspec.Struct, kw_only=True):
    """A served model. `root`: the base's name; `adapter`: the digest of the one on it, if any.

    `max_model_len`: tokens of prompt and completion together; `price_per_hour`: dollars.
    `training_flops`: of the run that trained it, null where no run says it; `served_flops`: of all
    tokens that this server has given for requests, of any model.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "thrice"
    root: str
    adapter: str | None = None
    max_model_len: int
    price_per_hour: float | None = None
    training_flops: int | None = None
    served_flops: int
    default_sampling: DefaultSampling


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class AdapterRequest(ModelRequest, kw_only=True):
    """POST /v1/adapters. `folder`: the adapter's, from the server's folder for them.

    `name`: by which requests ask for it.
    """

    name: Annotated[str, Meta(pattern=rf"^{PLAIN_NAME}$(?!\n)", max_length=64)]
    folder: Annotated[str, Meta(min_length=1, max_length=512)]


class AdapterReply(msgspec.Struct):
    id: str
    deleted: bool = True
    object: Literal["model"] = "model"


class Health(msgspec.Struct):
    """Whether requests are answered, or why not. `wait`: for what the engine is waited, and how long."""

    status: Status
    running: int
    waiting: int
    compiles_after_ready: int
    seconds_since_tick: float
    wait: Wait


class Live(msgspec.Struct):
    status: Literal["ok"] = "ok"


class ServerVersion(msgspec.Struct):
    version: str


class Attestation(msgspec.Struct, kw_only=True):
    """One SHA-256 over all weights, at load and now."""

    object: Literal["attestation"] = "attestation"
    algorithm: Literal["sha256"] = "sha256"
    digest: str
    digest_at_load: str
    unchanged: bool
    loaded_at: int
    checked_at: int


async def list_models(call: ApiCall) -> Response:
    """The models that are served; as Anthropic has them for a request with the header anthropic-version."""
    if ANTHROPIC_HEADER in call.http.headers:
        return json_reply(anthropic_models(call.state, call.http.query_params))
    return json_reply(ModelList([model_card(call.state, name) for name in call.state.served_names]))


async def retrieve_model(call: ApiCall) -> Response:
    """The model of that name; as Anthropic describes it to a request with the header anthropic-version."""
    name = call.state.find_model(call.http.path_params["model"]).name
    if ANTHROPIC_HEADER in call.http.headers:
        return json_reply(anthropic_model(call.state, name))
    return json_reply(model_card(call.state, name))


def model_card(state: ServerState, name: str) -> ModelCard:
    adapter = state.adapters.adapters.get(name)
    return ModelCard(
        id=name,
        created=state.loaded_at,
        root=state.name,
        adapter=adapter.digest if adapter else None,
        max_model_len=state.engine.capacity,
        price_per_hour=state.price,
        training_flops=state.training_flops,
        served_flops=state.engine.engine.meter.request_flops,
        default_sampling=msgspec.convert(state.sampling, DefaultSampling, from_attributes=True),
    )


async def add_adapter(call: ApiCall[AdapterRequest]) -> ModelCard:
    """Adds an adapter, which requests may then name as their model."""
    state = call.state
    body = call.body
    if body.name in (*state.names, "default"):
        raise ApiError(409, f"{body.name} is the name of the model itself.", param="name")
    await state.adapters.add(body.name, body.folder)
    return model_card(state, body.name)


async def remove_adapter(call: ApiCall) -> AdapterReply:
    """Removes an adapter; requests under way go on with it."""
    name = call.http.path_params["model"]
    call.state.adapters.remove(name)
    return AdapterReply(name)


async def health(call: ApiCall) -> Response:
    """Whether requests are answered."""
    status = call.state.status
    engine = call.state.engine
    since = round(engine.seconds_since_tick, 3)
    reply = Health(
        status, engine.engine.running, engine.waiting, engine.compiles_after_ready, since, engine.wait
    )
    return json_reply(reply, 200 if status == "ok" else 503)


async def live(_: ApiCall) -> Live:
    """Whether the process runs."""
    return Live()


async def version(call: ApiCall) -> ServerVersion:
    """The version of this server, where vLLM tells its own."""
    return ServerVersion(call.http.app.version)


async def metrics(call: ApiCall) -> Response:
    """Counts and times, for Prometheus."""
    return Response(call.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def attest(call: ApiCall) -> Attestation:
    """The digest of the weights, at load and now."""
    state = call.state
    now = await state.hash_weights()
    return Attestation(
        digest=now,
        digest_at_load=state.digest,
        unchanged=now == state.digest,
        loaded_at=state.loaded_at,
        checked_at=int(time.time()),
    )


async def openapi(call: ApiCall) -> Response:
    """This document."""
    return Response(call.http.app.openapi, media_type="application/json")


async def library(call: ApiCall) -> Response:
    """A script that the page fetches when an answer first needs it."""
    content = library_of_page(call.http.scope["state"]["path"].rpartition("/")[2])
    # The page names its digest, so that a kept one is never another.
    return Response(
        content, media_type="text/javascript; charset=utf-8", headers={"Cache-Control": "max-age=86400"}
    )


async def page(call: ApiCall) -> Response:
    """A page to talk to the model."""
    html, policy = call.http.app.page
    return Response(html, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy})
