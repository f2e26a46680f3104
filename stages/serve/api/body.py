"""Reads the body of a request within bounds of size and time, and checks it field by field against its schema."""

import asyncio
import json
import math
import re
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from stages.serve.api.requests import UNSUPPORTED, ModelRequest
from stages.serve.errors import ApiError, ClientGone
from stages.serve.state import ServerState

MAX_BYTES = 4 * 2**20
INLINE_BYTES = 65_536  # more are decoded in a thread
BODY_SECONDS = 20.0  # for a body to come
MAX_SEARCH_BYTES = 2**20  # of a body in which the field that is no JSON is searched for


async def read_body[T: ModelRequest](state: ServerState, http: Request, kind: type[T]) -> T:
    """Returns the JSON body as `kind`. Raises ApiError, which names the field at fault, and ClientGone."""
    _check_headers(http)
    content = bytearray()  # counted: Content-Length is only a promise
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                if len(content) + len(part) > MAX_BYTES:
                    raise _too_large()
                state.admission.add_bytes(len(part))
                content += part
        body = _decode(content, kind) if len(content) <= INLINE_BYTES else await asyncio.to_thread(_decode, content, kind)
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {BODY_SECONDS:.0f} s.", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    finally:
        state.admission.remove_bytes(len(content))
    state.check_model(body.model)
    return body


def _decode[T: msgspec.Struct](content: bytearray, kind: type[T]) -> T:
    try:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
        return msgspec.convert(_integral(msgspec.json.decode(content)), kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except RecursionError:
        message = "The body is nested too deeply."
    except UnicodeDecodeError as error:
        message = f"The body is not UTF-8: {error.reason}."
    except msgspec.DecodeError as error:
        if place := _not_json(content):
            message = f"{place} holds NaN, Infinity or half of a surrogate pair: JSON has no such values."
            raise ApiError(400, message, param=place, code="invalid_value") from None
        message = f"The body is not JSON: {error}."
    raise ApiError(400, message)


def _not_json(content: bytearray) -> str:
    """Returns the first field whose value Python's parser reads though JSON has none such; empty for another fault."""
    if len(content) > MAX_SEARCH_BYTES:
        return ""
    try:  # numbers of any length are JSON
        return (_place(json.loads(content.decode(), parse_int=len)) or "").lstrip(".")
    except (ValueError, RecursionError):
        return ""


def _place(value: Any) -> str | None:
    """Returns the path, as msgspec spells it, of the first number that is not finite or text with half a surrogate pair."""
    steps: Any = ()
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, str) and not _is_text(value)):
        return ""
    if isinstance(value, dict):
        if not all(map(_is_text, value)):
            return ""
        steps = ((f".{_short(name)}" if name.isidentifier() else "[...]", inner) for name, inner in value.items())
    elif isinstance(value, list):
        steps = ((f"[{index}]", inner) for index, inner in enumerate(value))
    return next((step + rest for step, inner in steps if (rest := _place(inner)) is not None), None)


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _integral(value: Any) -> Any:
    """Returns the value with 5.0 as 5: in JSON, and to some languages' clients, they are one number."""
    if isinstance(value, dict):
        return {name: _integral(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_integral(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_headers(http: Request) -> None:
    kind, _, parameters = http.headers.get("content-type", "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters.lower())
    if kind.strip().lower() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8", "us-ascii")):
        raise ApiError(415, "The body must be JSON in UTF-8, sent with the header `Content-Type: application/json`.")
    if http.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise ApiError(415, "The body must not be compressed: send it without a Content-Encoding.")
    if content_length(http) > MAX_BYTES:
        raise _too_large()


def content_length(http: Request) -> int:
    """Returns the announced bytes of the body; 0 when they are not."""
    length = http.headers.get("content-length", "")
    return int(length[:20]) if length.isdecimal() else 0


def _too_large() -> ApiError:
    return ApiError(413, f"The body may have at most {MAX_BYTES:,} bytes.")


def _invalid(text: str) -> ApiError:
    """Turns msgspec's error into ours: `Expected `int`, got `str` - at `$.n`` is about the field n."""
    match = re.search(r" - at (?:`key` in )?`\$(.*?)`$", text)
    place = match[1].lstrip(".") if match else ""
    problem = text[: match.start()] if match else text
    if field := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", problem, re.S):
        param = f"{place}.{field[2]}" if place else field[2]
        if field[1] == "missing required":
            return ApiError(400, f"{param} is missing.", param=param, code="missing_required_parameter")
        name, why = _short(field[2]), UNSUPPORTED.get(field[2])
        message = f"{why}: leave {name} out." if why else f"There is no field {name!r}."
        return ApiError(400, message, param=_short(param), code="unknown_parameter")
    why = next((f" {UNSUPPORTED[name]}." for name in re.findall(r"\w+", place) if name in UNSUPPORTED), "")
    message = f"{place or 'The body'}: {_short(problem, 300)}.{why}"
    return ApiError(400, message, param=place or None, code="invalid_value")


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[:length] + "..."
