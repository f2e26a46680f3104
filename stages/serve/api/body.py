"""The body of a request: read within bounds of size and time, and checked field by field against its schema."""

import asyncio
import dataclasses
import json
import math
import re
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from stages.serve.api.request_schema import UNABLE
from stages.serve.errors import Gone, Refused

LARGEST = 4 * 2**20  # bytes
QUICK = 65_536  # bytes that are decoded in the event loop itself
SECONDS = 20.0  # in which a body must have come
SEARCHED = 2**20  # bytes of a body that is no JSON in which the place is looked for

PLACE = re.compile(r" - at (?:`key` in )?`\$(.*?)`$")
UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.S)
MISSING = re.compile(r"Object missing required field `(.*)`", re.S)


@dataclasses.dataclass
class Bodies:
    """Bytes of bodies, of all requests together, that have come and are not decoded: at most `most`, `held` just now."""

    most: int = 64 * 2**20
    held: int = 0

    def take(self, size: int) -> None:
        """Raises Refused when there is no room for so many more; nothing is taken then."""
        if self.held + size > self.most:
            raise Refused(
                429, f"Bodies of {self.held:,} bytes are coming in, and no more are taken in at once. Try again in 1 s.",
                code="rate_limit_exceeded", headers={"Retry-After": "1", "Connection": "close"},
            )  # fmt: skip
        self.held += size


async def read[T: msgspec.Struct](request: Request, kind: type[T]) -> T:
    """The JSON body as `kind`. Raises Refused, naming the field at fault, and Gone when the client leaves."""
    _check_headers(request)
    bodies: Bodies = request.app.state.served.bodies
    body = bytearray()
    try:
        await _receive(request, body, bodies)
        return decoded(body, kind) if len(body) <= QUICK else await asyncio.to_thread(decoded, body, kind)
    finally:
        bodies.held -= len(body)


async def _receive(request: Request, body: bytearray, bodies: Bodies) -> None:
    """Appends to `body` what comes, all of it counted in `bodies`. Promises of a Content-Length count for nothing."""
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                if len(body) + len(part) > LARGEST:
                    raise _too_large()
                bodies.take(len(part))
                body += part
    except TimeoutError:
        raise Refused(408, f"The body did not come within {SECONDS:.0f} s.", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Gone from None


def decoded[T: msgspec.Struct](body: bytes | bytearray, kind: type[T]) -> T:
    """A body that has been read. Raises Refused."""
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
        return msgspec.convert(_whole(msgspec.json.decode(body)), kind)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from None
    except RecursionError:
        raise Refused(400, "The body is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise Refused(400, f"The body is not UTF-8: {error.reason}.") from None
    except msgspec.DecodeError as error:
        if place := _unspeakable(body):
            said = f"{place} holds NaN, Infinity or half of a surrogate pair: JSON has no such values."
            raise Refused(400, said, param=place, code="invalid_value") from None
        raise Refused(400, f"The body is not JSON: {error}.") from None


def _unspeakable(body: bytes | bytearray) -> str:
    """The first field that holds what Python's parser reads but JSON has not; empty where that is not what is wrong."""
    if len(body) > SEARCHED:
        return ""
    try:
        found = _place(json.loads(body.decode(), parse_int=len))  # whose digits are not at fault, however many there are
        return (found or "").lstrip(".")
    except (ValueError, RecursionError):
        return ""


def _place(value: Any) -> str | None:
    """The way to the first number that is not finite or text with half of a surrogate pair, spelled as msgspec does."""
    if isinstance(value, float | str):
        sound = math.isfinite(value) if isinstance(value, float) else _is_text(value)
        return None if sound else ""
    steps: Any = ()
    if isinstance(value, dict):
        if not all(map(_is_text, value)):
            return ""
        steps = ((f".{_short(name)}" if name.isidentifier() else "[...]", inner) for name, inner in value.items())
    elif isinstance(value, list):
        steps = ((f"[{index}]", inner) for index, inner in enumerate(value))
    return next((step + rest for step, inner in steps if (rest := _place(inner)) is not None), None)


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _whole(value: Any) -> Any:
    """The same with 5.0 as 5: to JSON, and to clients in some languages, they are one number."""
    if isinstance(value, dict):
        return {name: _whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_headers(request: Request) -> None:
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters.lower())
    if kind.strip().lower() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8", "us-ascii")):
        raise Refused(415, "The body must be JSON in UTF-8, sent with the header `Content-Type: application/json`.")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise Refused(415, "The body must not be compressed: send it without a Content-Encoding.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > LARGEST:
        raise _too_large()


def _too_large() -> Refused:
    return Refused(413, f"The body may have at most {LARGEST:,} bytes.")


def _refused(said: str) -> Refused:
    """msgspec's words as ours: `Expected `int`, got `str` - at `$.n`` names the field n."""
    found = PLACE.search(said)
    place = found[1].lstrip(".") if found else ""
    words = said[: found.start()] if found else said
    if unknown := UNKNOWN.fullmatch(words):
        name = unknown[1]
        why = UNABLE.get(name)
        return Refused(
            400, f"{why}: leave {_short(name)} out." if why else f"There is no field {_short(name)!r}.",
            param=_short(f"{place}.{name}" if place else name), code="unknown_parameter",
        )  # fmt: skip
    if missing := MISSING.fullmatch(words):
        name = f"{place}.{missing[1]}" if place else missing[1]
        return Refused(400, f"{name} is missing.", param=name, code="missing_required_parameter")
    why = next((UNABLE[name] for name in re.findall(r"\w+", place) if name in UNABLE), "")
    about = f"{place}: " if place else "The body: "
    return Refused(
        400, f"{about}{_short(words, 300)}." + (f" {why}." if why else ""), param=place or None, code="invalid_value"
    )  # fmt: skip


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[:most] + "..."
