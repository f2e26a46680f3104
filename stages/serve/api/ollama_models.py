"""Ollama's routes about served models: GET /api/tags, /api/ps, /api/version, POST /api/show, /api/pull."""

import datetime
from typing import Any, Literal

import jax
import msgspec

from engine.counting.params import count_params
from engine.model.weights.convert import weight_types
from stages.serve.api.fields import ModelRequest
from stages.serve.api.requests import ApiCall
from stages.serve.state import ServerState

LOADED_DAYS = 36_500  # until a model is unloaded, as /api/ps has it: this server never does it


class Tags(msgspec.Struct):
    """The reply of GET /api/tags, and of /api/ps: what is served is loaded."""

    models: list[dict[str, Any]]


class Version(msgspec.Struct):
    """The reply of GET /api/version. Clients ask whether it is new enough for tools and schemas."""

    version: str = "0.12.0"


class PullRequest(ModelRequest):
    """POST /api/pull. `name`: what older clients call the model."""

    name: str | None = None
    stream: bool | None = None
    insecure: bool | None = None


class PullReply(msgspec.Struct):
    """A whole reply, and the last line of a stream, which has no other."""

    status: Literal["success"] = "success"


class ShowRequest(ModelRequest):
    """POST /api/show. `name`: what older clients call the model."""

    name: str | None = None
    verbose: bool | None = None


class Show(msgspec.Struct):
    modified_at: datetime.datetime
    details: dict[str, Any]
    model_info: dict[str, Any]
    template: str
    capabilities: tuple[str, ...] = ("completion", "tools", "embedding")


async def ollama_tags(call: ApiCall) -> Tags:
    """The model that is served, as Ollama has it."""
    at = _loaded_at(call.state)
    return Tags([model | {"modified_at": at} for model in _models(call.state)])


async def ollama_ps(call: ApiCall) -> Tags:
    """The model that is served: it is loaded."""
    state = call.state
    on_devices = 0
    for leaf in jax.tree.leaves(state.engine.engine.params):
        if all(device.platform != "cpu" for device in leaf.devices()):
            on_devices += leaf.nbytes
    loaded = {
        "expires_at": _loaded_at(state) + datetime.timedelta(days=LOADED_DAYS),
        "size_vram": on_devices,
        "context_length": state.engine.capacity,
    }
    return Tags([model | loaded for model in _models(state)])


async def ollama_version(_: ApiCall) -> Version:
    """A version of Ollama that has what is here."""
    return Version()


async def ollama_pull(call: ApiCall[PullRequest]) -> PullReply:
    """Whether a model is there: programs ask for it before they use it. Nothing is downloaded."""
    if call.body.name:
        call.state.find_model(call.body.name)
    return PullReply()


async def ollama_show(call: ApiCall[ShowRequest]) -> Show:
    """What a model is and can do."""
    state = call.state
    if call.body.name:
        state.find_model(call.body.name)
    cfg = state.engine.cfg
    info = {
        "general.architecture": "llama",
        "general.parameter_count": count_params(cfg).total,
        "llama.context_length": state.engine.capacity,
        "llama.embedding_length": cfg.width,
    }
    return Show(_loaded_at(state), _details(state), info, state.tokenizer.template)


def _loaded_at(state: ServerState) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(state.loaded_at, datetime.UTC)


def _models(state: ServerState) -> list[dict[str, Any]]:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.engine.engine.params))
    model = {"size": size, "digest": state.digest, "details": _details(state)}
    return [{"name": name, "model": name, **model} for name in state.served_names]


def _details(state: ServerState) -> dict[str, Any]:
    engine = state.engine.engine
    return {
        "parent_model": "",
        "format": "thrice",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": f"{count_params(engine.cfg).total / 1e6:.1f}M",
        "quantization_level": weight_types(engine.params),
    }
