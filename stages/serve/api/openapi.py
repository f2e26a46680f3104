"""Writes the server's OpenAPI document from the types that check the bodies of requests."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from stages.serve.api.completions import ChatChunk
from stages.serve.api.requests import MAX_PROMPTS, TOKEN_ID
from stages.serve.errors import ErrorReply

ABOUT = "The routes of this server. Fields follow OpenAI's API, and vLLM's where OpenAI's has no name."
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
array = lambda items, **bounds: {"type": "array", "minItems": 1, "items": items, **bounds}
json_body = lambda kind: {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def document(routes: Sequence[Any], vocab: int, version: str) -> bytes:
    """Returns OpenAPI 3.1 of the routes as JSON."""
    types = [kind for route in routes for kind in (route.body, route.reply) if kind] + [ErrorReply, ChatChunk]
    _, components = msgspec.json.schema_components(dict.fromkeys(types), ref_template="#/components/schemas/{name}")
    components["TokenId"] = {"type": "integer", "minimum": 0, "exclusiveMaximum": vocab}
    texts = {"anyOf": [TEXT, array(TEXT, maxItems=MAX_PROMPTS), array(TOKEN_ID), array(array(TOKEN_ID), maxItems=MAX_PROMPTS)]}
    components["CompletionRequest"]["properties"]["prompt"] = components["EmbeddingsRequest"]["properties"]["input"] = texts
    components["ChatRequest"] |= {  # top_logprobs is a number only where logprobs is true
        "if": {"properties": {"top_logprobs": {"type": "integer"}}, "required": ["top_logprobs"]},
        "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    }
    components["TokenizeRequest"] |= {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    paths: dict[str, Any] = {}
    for route in routes:
        kind = "object" if route.media == "application/json" else "string"
        success = json_body(route.reply) if route.reply else {route.media: {"schema": {"type": kind}}}
        if route.streams:
            success["text/event-stream"] = {}  # `data:` lines of JSON, the last one `[DONE]`
        responses: dict[str, Any] = {"200": {"description": "Success.", "content": success}}
        for status in route.statuses:
            content = success if (route.path, status) == ("/health", 503) else json_body(ErrorReply)
            responses[str(status)] = {"description": STATUSES[status], "content": content}
        operation: dict[str, Any] = {"operationId": route.name, "summary": route.summary, "responses": responses}
        if route.body:
            operation["requestBody"] = {"required": True, "content": json_body(route.body)}
        if "{model" in route.path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": TEXT}]
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    keys = {"key": {"type": "http", "scheme": "bearer"}}
    openapi = {
        "openapi": "3.1.0",
        "info": {"title": "Thrice", "version": version, "description": ABOUT},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": keys},
        "security": [{}, {"key": []}],
    }
    return json.dumps(openapi, ensure_ascii=False).encode()
