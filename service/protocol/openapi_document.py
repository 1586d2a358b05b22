"""The endpoint's OpenAPI document, in the form that fal publishes."""

from typing import Any

from pydantic.json_schema import models_json_schema

from .clip_input import Input, Output
from .urls import QUEUE_PREFIX

ID = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
LOGS = {"name": "logs", "in": "query", "required": False, "schema": {"type": "number"}}
NULL = {"type": "null"}
TEXT, OBJECT = {"type": "string"}, {"type": "object"}


def queue_document(endpoint: str, root: str, given: type[Input]) -> dict[str, Any]:
    """Returns the document for a queue.

    Args:
        endpoint: its name.
        root: URL of the server, without a path.
        given: its input.
    """
    schemas = _schemas(given)
    reference = {name: {"$ref": f"#/components/schemas/{name}"} for name in schemas}
    result, status = reference["AnimatediffSparsectrlLcmOutput"], reference["QueueStatus"]
    body = {"required": True, "content": _json(reference["AnimatediffSparsectrlLcmInput"])}
    cancelled = _object(status=TEXT), _object(success={"type": "boolean"})
    path = f"/{endpoint}"
    one = f"{path}/requests/{{request_id}}"
    paths: dict[str, dict[str, Any]] = {
        path: {"post": {"requestBody": body, "responses": _answers({200: status}, 400, 413, 422, 429, 503)}},
        one: {"get": {"responses": _answers({200: result}, 400, 404, 422, 499, 500, 503, 504)}},
        f"{one}/status": {"get": {"parameters": [LOGS], "responses": _answers({200: status, 202: status}, 404)}},
        f"{one}/cancel": {"put": {"responses": _answers({202: cancelled[0], 200: cancelled[1]}, 400, 404)}},
    }
    for name, item in paths.items():
        if name != path:
            item["parameters"] = [ID]
    key = {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Key <id>:<secret>"}
    return {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {endpoint}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {endpoint} queue.",
            "x-fal-metadata": {
                "endpointId": endpoint,
                "category": "text-to-video",
                "thumbnailUrl": f"{root}/page/icon.svg",
                "playgroundUrl": f"{root}/",
                "documentationUrl": f"{root}/#code",
            },
        },
        "components": {"securitySchemes": {"apiKeyAuth": key}, "schemas": schemas},
        "paths": paths,
        "servers": [{"url": root + QUEUE_PREFIX}],
        "security": [{"apiKeyAuth": []}],
    }


def _schemas(given: type[Input]) -> dict[str, Any]:
    _, definitions = models_json_schema(
        [(given, "validation"), (Output, "validation")], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = definitions["$defs"]
    for name, kind in ((given.__name__, "Input"), ("Output", "Output")):
        schemas[f"AnimatediffSparsectrlLcm{kind}"] = schemas.pop(name)
    for schema in schemas.values():
        schema["properties"] = {name: _as_3_0(about) for name, about in schema["properties"].items()}
        schema["x-fal-order-properties"] = list(schema["properties"])
    schemas["QueueStatus"] = _object("status", "request_id", **_QUEUE_STATUS)
    schemas["Error"] = _object("detail", detail={})
    return schemas


def _as_3_0(about: dict[str, Any]) -> dict[str, Any]:
    """Rewrites a property for OpenAPI 3.0, which has no null type."""
    choices = about.get("anyOf", [])
    if NULL not in choices:
        return about
    (kind,) = (choice for choice in choices if choice != NULL)
    rest = {name: value for name, value in about.items() if name != "anyOf" and (name, value) != ("default", None)}
    return {**rest, **kind, "nullable": True}


def _answers(success: dict[int, Any], *errors: int) -> dict[str, Any]:
    """Returns the responses of an operation. Errors have a `detail`, except those that only name a state."""
    answers = {str(code): {"description": "Done.", "content": _json(schema)} for code, schema in success.items()}
    return answers | {str(code): {"description": "Refused.", "content": _json(_REFUSED)} for code in (401, *errors)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | ({"required": list(required)} if required else {})


_REFUSED = {"oneOf": [{"$ref": "#/components/schemas/Error"}, _object("status", status=TEXT)]}
_QUEUE_STATUS = {
    "status": {"type": "string", "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
    "request_id": TEXT,
    "response_url": TEXT,
    "status_url": TEXT,
    "cancel_url": TEXT,
    "logs": {"type": "array", "nullable": True, "items": OBJECT},
    "metrics": OBJECT,
    "queue_position": {"type": "integer"},
    "error": TEXT,
    "error_type": TEXT,
}
