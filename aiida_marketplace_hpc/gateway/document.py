"""The OpenAPI document: the capability table in words that other programs read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiida_marketplace_hpc import __version__, bundle
from aiida_marketplace_hpc.errors import GatewayError, all_gateway_errors
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.protocol import (
    CAPABILITIES,
    CARRIER,
    CREATE_FIELDS_PUBLISHED,
    ENVELOPE,
    ENVELOPE_FIELDS,
    MAX_OPERATIONS,
    OPERATIONS,
    REQUEST_ID_HEADER,
    Capability,
    Operation,
    Parameter,
)

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "pattern": r"^[^\u0000]*$"}
_NUMBER: Schema = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
_FLAG: Schema = {"type": "boolean"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_SECONDS: Schema = {"type": "number", "minimum": 0, "exclusiveMaximum": 1e9}
_BINARY: Schema = {"type": "string", "format": "binary"}
_PARAMETERS = {"string": _TEXT, "integer": _NUMBER, "boolean": _FLAG}
_FIELDS: dict[str, Schema] = {
    "mode": _NUMBER,
    "strip_components": _NUMBER,
    "wait": _NUMBER,
    "sources": _TEXTS,
    "jobids": _TEXTS,
}
"""The types of an operation's fields that are neither a text nor, if they are optional, a flag."""
_TEXT_FIELDS = {"pattern"}
"""Optional fields that are a text."""


def document(settings: Settings) -> dict[str, Any]:
    """Describe the gateway of these settings."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": settings.name,
            "version": __version__,
            "description": "An HPC gateway: run jobs on a cluster and reach its files over HTTP.",
        },
        **described(CAPABILITIES),
    }


def described(capabilities: Iterable[Capability]) -> dict[str, Any]:
    """What a document says about these capabilities: ``paths``, ``components`` and ``security``."""
    paths: dict[str, dict[str, Any]] = {}
    for capability in capabilities:
        paths.setdefault(capability.path, {})[capability.method.lower()] = _described(capability)
    return {
        "paths": paths,
        "components": {
            "securitySchemes": {"bearerAuth": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error()},
            "headers": {
                "RequestId": {
                    "description": "the id under which the gateway's log has the request",
                    "required": True,
                    "schema": {"type": "string"},
                },
                "RetryAfter": {"description": "seconds", "required": True, "schema": {"type": "integer"}},
            },
        },
        "security": [{"bearerAuth": []}],
    }


def _described(capability: Capability) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": capability.name,
        "summary": capability.summary,
        "parameters": [_parameter(parameter) for parameter in capability.parameters],
        "responses": _responses(capability),
    }
    if not capability.authenticated:
        described["security"] = []
    if capability.body == "json":
        schema = _query() if capability.name == "query" else _job()
        described["requestBody"] = {
            "required": capability.name == "query",
            "content": {"application/json": {"schema": schema}},
        }
    if capability.body == "file":
        form = {"type": "object", "required": ["file"], "properties": {"file": _BINARY}}
        described["requestBody"] = {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": _BINARY},
                "multipart/form-data": {"schema": form},
            },
        }
    return described


def _parameter(parameter: Parameter) -> dict[str, Any]:
    schema = _PARAMETERS[parameter.type]
    if parameter.where == "path":
        schema = {"type": "string", "pattern": r"^[^/\u0000]+$"}
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required,
        "description": parameter.description,
        "schema": schema,
    }


def _responses(capability: Capability) -> dict[str, Any]:
    request_id = {REQUEST_ID_HEADER: {"$ref": "#/components/headers/RequestId"}}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if capability.name == "getDataset":
        kinds = ("application/octet-stream", "text/plain", bundle.MEDIA_TYPE)
        content = {kind: {"schema": _BINARY} for kind in kinds}
    responses = {"200": {"description": "It is done.", "headers": request_id, "content": content}}
    for status, errors in sorted(_statuses(capability).items()):
        headers = dict(request_id)
        if status == 429:
            headers["Retry-After"] = {"$ref": "#/components/headers/RetryAfter"}
        responses[str(status)] = {
            "description": " ".join(str(error.__doc__).partition("\n")[0] for error in errors),
            "headers": headers,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
    return responses


def _statuses(capability: Capability) -> dict[int, list[type[GatewayError]]]:
    found: dict[int, list[type[GatewayError]]] = {}
    for error in all_gateway_errors():
        if capability.authenticated or error.code in ("busy", "server_fault"):
            found.setdefault(error.status, []).append(error)
    return found


def _error() -> Schema:
    return {
        "type": "object",
        "required": ["error", "code", "retryable", "request_id"],
        "properties": {
            "error": {"type": "string", "description": "what happened and what to do, for a person"},
            "code": {"enum": sorted(error.code for error in all_gateway_errors())},
            "retryable": {"type": "boolean", "description": "whether the same request may succeed later"},
            "request_id": {"type": ["string", "null"]},
            "retry_after": {"type": "number", "description": "seconds"},
            "errno": {"type": "string", "description": "the name of the POSIX error, such as ENOENT"},
            "path": {"type": "string", "description": "what it is about, absolute on the cluster"},
        },
    }


def _job() -> Schema:
    text = {"type": ["string", "null"], "maxLength": 4096, "pattern": r"^[^\u0000]*$"}
    published: Schema = dict.fromkeys(CREATE_FIELDS_PUBLISHED, text)
    return {
        "type": "object",
        "additionalProperties": False,
        "description": "a job of a folder and a script in it; or, as published, of a container image and a command",
        "properties": {
            **published,
            "ntasks_per_node": {"type": ["integer", "string", "null"], "minimum": 1},
            **dict.fromkeys(("folder", "script", "client_ref", "key", "machine"), text),
            "launch": _FLAG,
            ENVELOPE: _envelope(),
        },
    }


def _envelope() -> Schema:
    kinds: dict[str, Schema] = {
        "capability": {"enum": sorted(row.name for row in CAPABILITIES if row.name != CARRIER)},
        "parameters": {"type": "object", "additionalProperties": _TEXT},
        "fields": {"type": "object"},
        "content": {"type": "string", "format": "byte"},
    }
    return {
        "type": "object",
        "description": "in place of everything else: the request of another capability, answered as that is",
        "required": ["capability"],
        "additionalProperties": False,
        "properties": {name: {**kinds[name], "description": text} for name, text in ENVELOPE_FIELDS.items()},
    }


def _query() -> Schema:
    return {
        "type": "object",
        "properties": {
            "operations": {
                "type": "array",
                "maxItems": MAX_OPERATIONS,
                "items": {"oneOf": [_operation(operation) for operation in OPERATIONS.values()]},
            },
            "stop_on_error": _FLAG,
            "machine": _TEXT,
            "key": {"type": "string", "pattern": "^[A-Za-z0-9]{16,64}$"},
            "again": _SECONDS,
            "wait": _SECONDS,
            "stop": _FLAG,
        },
        "anyOf": [{"required": ["operations"]}, {"required": ["key"]}],
    }


def _operation(operation: Operation) -> Schema:
    properties: Schema = {"op": {"const": operation.name}}
    for name in operation.required:
        properties[name] = _FIELDS.get(name, _TEXT)
    for name in operation.optional:
        properties[name] = _FIELDS.get(name, _TEXT if name in _TEXT_FIELDS else _FLAG)
    return {
        "type": "object",
        "description": operation.summary,
        "required": ["op", *operation.required],
        "additionalProperties": False,
        "properties": properties,
    }
