"""What a client is told when something cannot be done: an HTTP status and OpenAI's error object, which names the field."""

import sys
import traceback
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 411: "invalid_request_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error",
}  # fmt: skip


class Problem(msgspec.Struct):
    """What went wrong, in OpenAI's words: a sentence, its kind, the field it is about, a code for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct):
    """The body of every reply that is not a success."""

    error: Problem


class Refused(Exception):
    """Raised anywhere on the way of a request; becomes the reply."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def problem(self) -> Problem:
        return Problem(self.message, KINDS.get(self.status, "invalid_request_error"), self.param, self.code)

    def reply(self) -> Response:
        return json_reply(ErrorReply(self.problem), self.status, self.headers)


class Gone(Exception):
    """The client has left; nobody reads a reply."""


def at_fault(error: BaseException) -> Refused:
    """What a client is told of a mistake of ours, which is printed where the server's owner sees it."""
    traceback.print_exception(error, file=sys.stderr)
    return Refused(500, "The server is at fault; what happened is in its log.")


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A Struct, or plain data, as JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def problem_json(status: int, message: str, code: str | None = None) -> bytes:
    """The body alone, for replies that are made below the application."""
    return msgspec.json.encode(ErrorReply(Refused(status, message, code=code).problem))
