"""The application: the routes, what becomes of errors, and the guard around them."""

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
from stages.serve.errors import Gone, Refused, at_fault
from stages.serve.state import Served


def make_app(
    served: Served, page: tuple[bytes, str], *, keys: Sequence[str] = (), hosts: frozenset[str] | None,
    origins: frozenset[str] = frozenset(), version: str = "0",
) -> ASGIApp:  # fmt: skip
    """What uvicorn runs. `page` is the document at / and its Content-Security-Policy; the rest as for Guard."""
    app = Starlette(
        routes=[Route(route.path, route.handler, methods=[route.method]) for route in ROUTES],
        exception_handlers={Refused: _refused, Gone: _gone, HTTPException: _no_route, Exception: _at_fault},
    )
    app.router.redirect_slashes = False
    app.state.served, app.state.page = served, page
    app.state.openapi = openapi.document(served.engine.cfg.vocab, served.engine.capacity, version)
    count = lambda status: served.metrics.responses.labels(str(status)).inc()
    return Guard(app, keys=keys, hosts=hosts, origins=origins, count=count)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.reply()


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # to nobody


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        said = f"{request.url.path} is not asked for with {request.method}, but with {allowed}."
        return Refused(405, said, code="method_not_allowed", headers=error.headers).reply()
    said = "There is no such route; /openapi.json lists them all."
    return Refused(error.status_code, said if error.status_code == 404 else error.detail, code="not_found").reply()


async def _at_fault(_: Request, error: Exception) -> Response:
    return at_fault(error).reply()
