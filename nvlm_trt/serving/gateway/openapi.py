"""Describes the endpoints at /openapi.json."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_REFERENCE = "#/components/schemas/{model}"
_SCHEMES = {"apiKey": {"type": "http", "scheme": "bearer"}}
_STATUSES = {
    "400": "The request is wrong",
    "401": "The API key is missing or wrong",
    "404": "The model is not served here",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "The queue is full",
    "503": "The server is starting or stopping",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return what FastAPI is told of an endpoint that reads the body of `model` by itself, within limits."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    content = {"application/json": {"schema": schema}}
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {status: {"description": text, "content": error} for status, text in _STATUSES.items()},
    }


def describe(app: FastAPI, models: list[type[BaseModel]], has_keys: bool) -> None:
    """Make the application describe the bodies of its endpoints."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = schema.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            schemas["Error"] = _ERROR
            for model in models:
                of_model = model.model_json_schema(ref_template=_REFERENCE)
                schemas.update(of_model.pop("$defs", {}))
                schemas[model.__name__] = of_model
            if has_keys:
                components["securitySchemes"] = _SCHEMES
                schema["security"] = [{"apiKey": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
