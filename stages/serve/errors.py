"""API errors: an HTTP status, and a body that the clients of OpenAI, Anthropic or Ollama read.

OpenAI's and Anthropic's read one object, which names the field; Ollama's read a sentence.
"""

import sys
import traceback
from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from engine.errors import InvalidField

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left before its response

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorDetails(msgspec.Struct):
    """What Anthropic's clients read to go on after an error: its code, and which fields are not supported."""

    error_code: str
    unsupported: list[str]


class ErrorObject(msgspec.Struct):
    """One error in OpenAI's form: a sentence, its type, the field it is about, and a code for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    details: ErrorDetails | UnsetType = UNSET


class ErrorReply(msgspec.Struct):
    """An error as OpenAI's clients read it, and Anthropic's, which look at the type too."""

    error: ErrorObject
    type: Literal["error"] = "error"


class SentenceReply(msgspec.Struct):
    """An error as Ollama's clients read it."""

    error: str


def reply_class(path: str) -> type[ErrorReply | SentenceReply]:
    """Returns the class of the body of an error: Ollama's routes are below /api."""
    return SentenceReply if path.startswith("/api/") else ErrorReply


class ApiError(Exception):
    """An error that a client reads: its status, its sentence, and the field that it is about (`param`).

    `code`: its name for programs. `body`: in OpenAI's form. `headers`: of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: ErrorDetails | UnsetType = UNSET,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        self.error = ErrorObject(message, kind, param, code, details)
        self.body = msgspec.json.encode(ErrorReply(self.error))

    def reply(self, path: str) -> Response:
        """Returns the reply to a request for that path."""
        body = self.body
        if reply_class(path) is SentenceReply:
            body = msgspec.json.encode(SentenceReply(self.error.message))
        return Response(body, self.status, self.headers, media_type="application/json")


class ClientGone(Exception):
    """Raised when the client has left: nobody reads a reply."""


def error_reply(error: Exception, path: str) -> Response:
    """Returns the reply to a request for that path, which ended with an error."""
    if isinstance(error, ClientGone):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return api_error(error).reply(path)


def api_error(error: Exception) -> ApiError:
    """Returns an error as clients read it: an InvalidField with status 400.

    Prints one that is the server's own.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidField):
        return ApiError(400, str(error), param=error.field)
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "The server is at fault; what happened is in its log.")
