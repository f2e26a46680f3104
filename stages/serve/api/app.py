"""make_app: the ASGI application, which is the routes, their error replies, and the guard around them."""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from stages.serve.api import openapi
from stages.serve.api.guard import Guard
from stages.serve.api.routes import ROUTES
from stages.serve.errors import ApiError, ClientGone, internal_error
from stages.serve.state import ServerState


def make_app(
    state: ServerState, page: tuple[bytes, str], *, keys: Sequence[str] = (), hosts: frozenset[str] | None,
    origins: frozenset[str] = frozenset(), version: str = "0",
) -> ASGIApp:  # fmt: skip
    """Returns the application that uvicorn runs.

    `page` is the document at / and its Content-Security-Policy; `keys`, `hosts` and `origins` are those of Guard.
    """
    app = Starlette(
        routes=[Route(route.path, route.handler, methods=[route.method]) for route in ROUTES],
        exception_handlers={ApiError: _api_error, ClientGone: _client_gone, HTTPException: _no_route, Exception: _internal},
    )
    app.router.redirect_slashes = False
    app.state.server, app.state.page = state, page
    app.state.openapi = openapi.document(state.engine.cfg.vocab, state.engine.capacity, version)
    count = lambda status: state.metrics.responses.labels(str(status)).inc()
    return Guard(app, keys=keys, hosts=hosts, origins=origins, count=count)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.reply()


async def _client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # to nobody


async def _no_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{http.url.path} is not asked for with {http.method}, but with {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers=error.headers).reply()
    message = "There is no such route; /openapi.json lists them all."
    return ApiError(error.status_code, message if error.status_code == 404 else error.detail, code="not_found").reply()


async def _internal(_: Request, error: Exception) -> Response:
    return internal_error(error).reply()
