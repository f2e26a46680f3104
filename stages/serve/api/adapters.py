"""POST /v1/adapters and DELETE /v1/adapters/NAME: adapters come and go while the server serves. None changes the base."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from stages.serve.api.requests import ModelRequest
from stages.serve.api.status import model_card
from stages.serve.api.writer import json_reply
from stages.serve.errors import ApiError
from stages.serve.state import ServerState


class AdapterRequest(ModelRequest, kw_only=True):
    """POST /v1/adapters. `folder`: the adapter's, from the server's folder for them. `name`: by which requests ask for it."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,64}$(?!\n)")]
    folder: Annotated[str, Meta(min_length=1, max_length=512)]


class AdapterReply(msgspec.Struct):
    """The reply of DELETE /v1/adapters/NAME."""

    id: str
    deleted: bool = True
    object: Literal["model"] = "model"


async def add(state: ServerState, _: Request, body: AdapterRequest) -> Response:
    if body.name in (*state.names, "default"):
        raise ApiError(409, f"{body.name} is the name of the model itself.", param="name")
    await state.adapters.add(body.name, body.folder)
    return json_reply(model_card(state, body.name))


async def remove(state: ServerState, http: Request) -> Response:
    state.adapters.remove(name := http.path_params["model"])
    return json_reply(AdapterReply(name))
