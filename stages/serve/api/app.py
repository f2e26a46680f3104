"""Makes the ASGI application: the routes, their error replies, and around them the guard and the access log."""

import functools
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from stages.serve.api import openapi
from stages.serve.api.access_log import CLIENT_CLOSED_REQUEST, AccessLog
from stages.serve.api.guard import NO_ROUTE, Guard
from stages.serve.api.routes import ROUTES
from stages.serve.errors import ApiError, ClientGone, internal_error
from stages.serve.page import page
from stages.serve.state import ServerState


def make_app(
    state: ServerState, keys: Sequence[str], hosts: frozenset[str] | None, origins: frozenset[str], version: str,
    log: str = "off",
) -> ASGIApp:  # fmt: skip
    """Returns the application that uvicorn runs; `keys`, `hosts` and `origins` are those of Guard, `log` is the log's form."""
    app = Starlette(
        routes=[Route(each.path, functools.partial(each.handler, state), methods=[each.method]) for each in ROUTES],
        exception_handlers=dict.fromkeys((ApiError, ClientGone, HTTPException, Exception), _error_reply),
    )
    app.router.redirect_slashes = False
    app.state.page = page()
    app.state.openapi = openapi.document(state.engine.cfg.vocab, version)
    return AccessLog(Guard(app, keys, hosts, origins), log, state.metrics.count_response)


async def _error_reply(http: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # to nobody
    if isinstance(error, HTTPException):
        message, code = error.detail, "not_found"
        if error.status_code == 404:
            message = NO_ROUTE
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message, code = f"{http.url.path} is not asked for with {http.method}, but with {allowed}.", "method_not_allowed"
        error = ApiError(error.status_code, message, code=code, headers=error.headers)
    return (error if isinstance(error, ApiError) else internal_error(error)).reply()
