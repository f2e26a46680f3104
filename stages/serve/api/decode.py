"""Decodes a JSON body as the type of a request; an error names the field that is at fault."""

import itertools
import re
from typing import Any

import msgspec

from stages.serve.api.unsupported import UNSUPPORTED
from stages.serve.errors import ApiError

MAX_NULL_FIELDS = 32  # unknown fields that are removed from a body: the body is checked once more for each
# msgspec's sentence: the field, and the path to its object, such as `.messages[1]`.
UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$(.*?)`)?", re.S)


def decode_body(content: bytearray, kind: Any) -> Any:
    """Returns a JSON body as `kind`. Raises ApiError, which names the field at fault."""
    try:
        return _decode(content, kind)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except RecursionError:
        message = "The body is nested too deeply."
    except UnicodeDecodeError as error:
        message = f"The body is not UTF-8: {error.reason}."
    except msgspec.DecodeError as error:
        message = f"The body is not JSON: {error}."
        if re.search(rb"\\ud[89a-f]", content, re.I):  # which msgspec takes for text that was cut
            message += " Half of a surrogate pair alone is no text."
    raise ApiError(400, message)


def _decode(content: bytearray, kind: Any) -> Any:
    """Returns a body as `kind`, read leniently where it does not fit at once.

    Then 5.0 is 5, and unknown fields may be null. Raises msgspec's errors.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        problem = str(error)
        if "got `float`" not in problem and not UNKNOWN_FIELD.fullmatch(problem):
            raise
    return _convert(_integral(msgspec.json.decode(content)), kind)


def _convert(value: Any, kind: Any) -> Any:
    """Returns a decoded body as `kind`, without the unknown fields that are null.

    Changes `value`. Clients and routers write as null the fields that nobody set, those of their
    next version too. Raises msgspec.ValidationError.
    """
    for _ in range(MAX_NULL_FIELDS):
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            if not _remove_null(value, str(error)):
                raise
    return msgspec.convert(value, kind)


def _remove_null(value: Any, problem: str) -> bool:
    """Removes the unknown field that msgspec's sentence names, where it is null; returns whether it was so.

    It is removed from all items of a list at once, since the body is checked once more after each
    removal.
    """
    match = UNKNOWN_FIELD.fullmatch(problem)
    if not match:
        return False
    field, path = match.groups()
    objects = [value]
    for name in re.findall(r"\.(\w+)|\[[^\]]*\]", path or ""):
        objects = list(itertools.chain.from_iterable(_inner(each, name) for each in objects))
    holders = [each for each in objects if isinstance(each, dict) and each.get(field, "") is None]
    for each in holders:
        del each[field]
    return bool(holders)


def _inner(value: Any, name: str) -> list[Any]:
    """Returns the field of that name of an object, or without a name all items of a list or an object."""
    if isinstance(value, dict):
        if not name:
            return list(value.values())
        return [value[name]] if name in value else []
    if isinstance(value, list) and not name:
        return value
    return []


def _integral(value: Any) -> Any:
    """Returns the value with 5.0 as 5: in JSON, and to some languages' clients, they are one number."""
    if isinstance(value, dict):
        return {name: _integral(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_integral(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _field_error(text: str) -> ApiError:
    """Returns the error for msgspec's sentence, as "Expected `int`, got `str` - at `$.n`" of a field n."""
    problem = text
    path = ""
    code = "invalid_value"
    place = re.search(r" - at (?:`key` in )?`\$(.*?)`$", text)
    if place:
        problem = text[: place.start()]
        path = place[1].lstrip(".")
    field = re.fullmatch(r"Object (?:contains unknown|missing required) field `(.*)`", problem, re.S)
    if field:
        path = ".".join(filter(None, (path, field[1])))
        code = "unknown_parameter" if "unknown" in problem else "missing_required_parameter"
    param = _short(path)
    message = f"{param or 'The body'}: {_short(problem, 300)}."
    # The field, or the value of a field such as a tool's type, without its date.
    names = [*re.findall(r"\w+", path), *re.findall(r"enum value '(\w+?)(?:_\d{8})?'", problem)]
    reasons = [UNSUPPORTED[name] for name in names if name in UNSUPPORTED]
    if reasons:
        message += f" {reasons[0]}."
    return ApiError(400, message, param=param or None, code=code)


def _short(text: str, length: int = 80) -> str:
    """Returns the beginning of a text, with dots where more follows."""
    return text if len(text) <= length else text[:length] + "..."
