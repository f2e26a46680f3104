"""Writes the OpenAPI document, which follows from the ROUTES and the types that check requests' bodies."""

import json
from typing import Any

import msgspec

from stages.serve.api.chat import ChatChunk
from stages.serve.api.fields import MAX_PROMPTS, TOKEN_ID
from stages.serve.api.routes import ROUTES, Route
from stages.serve.errors import reply_class

BODY_ERRORS = (400, 404, 408, 413, 415, 429, 503)  # of routes with a body
GUARD_ERRORS = (401, 403)  # of all
ABOUT = (
    "The routes of this server. Fields follow OpenAI's API, and vLLM's where OpenAI's has no name. "
    "The header `X-Usage-Cost: 1` asks for what a request has cost, in its usage."
)
STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no key, or a wrong one.",
    403: "The Host or Origin is not one that may use this server.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    409: "Another adapter is in the way.",
    429: "All places are taken; Retry-After says how long to wait.",
    500: "The server is at fault.",
    503: "Requests are not answered at the moment.",
}
TEXT = {"type": "string", "minLength": 1}


def json_body(kind: type) -> dict[str, Any]:
    """Returns the content of a body or a reply of that type."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def array_of(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    """Returns the schema of a list with at least one item."""
    return {"type": "array", "minItems": 1, "items": items, **bounds}


def openapi_document(vocab: int, version: str, root_path: str = "") -> bytes:
    """Returns OpenAPI 3.1 of the ROUTES below `root_path`, as JSON, for a model of `vocab` ids."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    keys = {"key": {"type": "http", "scheme": "bearer"}}
    openapi = {
        "openapi": "3.1.0",
        "info": {"title": "Thrice", "version": version, "description": ABOUT},
        "paths": paths,
        "components": {"schemas": _schemas(vocab), "securitySchemes": keys},
        "security": [{}, {"key": []}],
    }
    if root_path:
        openapi["servers"] = [{"url": root_path}]
    return json.dumps(openapi, ensure_ascii=False).encode()


def _schemas(vocab: int) -> dict[str, Any]:
    """Returns the schemas of all bodies and replies by their names, with what their types do not say."""
    types: list[Any] = []
    for route in ROUTES:
        types += [route.body, route.reply, reply_class(route.path)]
    types = [*dict.fromkeys(filter(None, types)), ChatChunk]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for component in components.values():
        if component.get("additionalProperties") is False:  # of a body, where an unknown field may be null
            component["additionalProperties"] = {"type": "null"}
    components["TokenId"] = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocab}
    texts = array_of(TEXT, maxItems=MAX_PROMPTS)
    tokens = array_of(TOKEN_ID)
    prompts = {"anyOf": [TEXT, texts, tokens, array_of(tokens, maxItems=MAX_PROMPTS)]}
    components["CompletionRequest"]["properties"]["prompt"] = prompts
    components["EmbeddingsRequest"]["properties"]["input"] = prompts
    components["ChatRequest"] |= {  # top_logprobs is a number above 0 only where logprobs is true
        "if": {
            "properties": {"top_logprobs": {"type": "integer", "minimum": 1}},
            "required": ["top_logprobs"],
        },
        "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    }
    components["TokenizeRequest"] |= {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    return components


def _operation(route: Route) -> dict[str, Any]:
    """Returns what the OpenAPI document says of a route."""
    summary = route.handler.__doc__ and route.handler.__doc__.partition("\n")[0]
    first, *others = route.handler.__name__.split("_")
    name = first + "".join(map(str.capitalize, others))  # as operations are named: createCompletion
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": _replies(route)}
    if route.body:
        operation["requestBody"] = {"required": True, "content": json_body(route.body)}
    if "{model" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": TEXT}]
    return operation


def _replies(route: Route) -> dict[str, Any]:
    """Returns the replies to a route's requests, by their status."""
    success: dict[str, Any] = {}
    if route.reply:
        success = json_body(route.reply)
    elif route.media == "application/json":
        success[route.media] = {"schema": {"type": "object"}}
    else:
        success[route.media] = {"schema": {"type": "string"}}
    if route.stream:
        success[route.stream] = {}
    codes = [*route.errors]
    if route.body:
        codes += BODY_ERRORS
    if route.stream:
        codes.append(500)
    replies: dict[str, Any] = {"200": {"description": "Success.", "content": success}}
    for code in (*codes, *GUARD_ERRORS):
        content = json_body(reply_class(route.path))
        if route.path == "/health" and code == 503:
            content = success
        replies[str(code)] = {"description": STATUSES[code], "content": content}
    return replies
