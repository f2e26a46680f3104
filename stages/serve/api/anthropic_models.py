"""The served models as Anthropic describes them, one or a page of a list."""

import datetime
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from engine.errors import InvalidField
from engine.untrusted import quote
from stages.serve.state import ServerState

PAGE = 20  # models of a list, where a request does not say how many
MAX_PAGE = 1000  # that it may ask for


class AnthropicModel(msgspec.Struct, kw_only=True):
    """A served model as Anthropic describes one.

    Both maxima are those of the prompt and its completion together.
    """

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int


class AnthropicModels(msgspec.Struct):
    """A page of the served models. `has_more`: whether others follow, or stand before `before_id`."""

    data: list[AnthropicModel]
    first_id: str | None
    last_id: str | None
    has_more: bool


def anthropic_model(state: ServerState, name: str) -> AnthropicModel:
    created_at = datetime.datetime.fromtimestamp(state.loaded_at, datetime.UTC)
    capacity = state.engine.capacity
    return AnthropicModel(
        id=name,
        display_name=name,
        created_at=created_at.isoformat(),
        max_input_tokens=capacity,
        max_tokens=capacity,
    )


def anthropic_models(state: ServerState, query: Mapping[str, str]) -> AnthropicModels:
    """Returns the page that `limit`, and `after_id` or `before_id`, ask for. Raises InvalidField."""
    names = state.served_names
    limit = _page_limit(query.get("limit", f"{PAGE}"))
    if "after_id" in query and "before_id" in query:
        raise InvalidField("before_id", "before_id is given beside after_id: give one of them.")
    for field in ("after_id", "before_id"):
        if query.get(field, names[0]) not in names:
            raise InvalidField(field, f"{field} names no model here: {quote(query[field])}.")
    if "before_id" in query:
        rest = names[: names.index(query["before_id"])]
        page = rest[-limit:]
    else:
        begin = 0
        if "after_id" in query:
            begin = names.index(query["after_id"]) + 1
        rest = names[begin:]
        page = rest[:limit]
    return AnthropicModels(
        [anthropic_model(state, name) for name in page],
        first_id=page[0] if page else None,
        last_id=page[-1] if page else None,
        has_more=len(page) < len(rest),
    )


def _page_limit(text: str) -> int:
    """Returns how many models a request asks for. Raises InvalidField."""
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_PAGE:
        raise InvalidField("limit", f"limit must be an integer from 1 to {MAX_PAGE:,}, not {quote(text)}.")
    return int(text)
