"""The registration document: what the MarketPlace is given when a gateway becomes one of its applications.

It is the gateway's own document (:mod:`aiida_marketplace_hpc.gateway.document`) of the capabilities that the platform's proxy
offers, in OpenAPI 3.0, which is what the platform reads, with what the platform wants to know beside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.auth.provider import checked_url
from aiida_marketplace_hpc.gateway.config import Product, Settings
from aiida_marketplace_hpc.gateway.document import described
from aiida_marketplace_hpc.protocol import CAPABILITIES, CREATE_FIELDS_ADDED, ENVELOPE, Capability


def registration(settings: Settings, *, classic: bool = False) -> dict[str, Any]:
    """Make the document of the gateway of these settings.

    :param classic: with nothing but the nine published capabilities, their published parameters and bodies.
    :raises ConfigurationError: naming what the platform needs and the settings do not say, or say wrongly.
    """
    told = settings.registration
    name = told.name or settings.name
    info: dict[str, Any] = {
        "title": name,
        "version": told.version,
        "description": told.description,
        "x-application-name": name,
        "x-api-version": told.api_version,
        "x-products": [
            {"name": product.name, "description": product.description, "product-id": product.id}
            for product in told.product or (Product(name=name, description=told.description),)
        ],
    }
    if told.contact:
        info["contact"] = {"email": told.contact}
    parts = described(_nine(CAPABILITIES) if classic else [row for row in CAPABILITIES if row.registered])
    if classic:
        _leave_published_bodies(parts["paths"])
    parts["components"]["securitySchemes"]["bearerAuth"]["bearerFormat"] = "JWT"
    whole = {"openapi": "3.0.3", "info": info, "servers": [{"url": _server(told.server, told.broker)}], **parts}
    return {key: _in_openapi_3_0(value) for key, value in whole.items()}


def _server(server: str, broker: str) -> str:
    if bool(server) == bool(broker):
        problem = "one of them, not both" if server else "neither is given"
        raise ConfigurationError(
            "where does the platform reach the gateway? Give --server URL, or, for a gateway behind a firewall, "
            f"--broker with the platform's address ({problem})"
        )
    if server:
        return checked_url(server, "--server")
    return f"{checked_url(broker, '--broker')}/message-broker"


def _nine(capabilities: Iterable[Capability]) -> list[Capability]:
    return [
        replace(row, parameters=tuple(one for one in row.parameters if one.published))
        for row in capabilities
        if row.published and row.registered
    ]


def _leave_published_bodies(paths: dict[str, Any]) -> None:
    for path in paths.values():
        for operation in path.values():
            content = operation.get("requestBody", {}).get("content", {})
            content.pop("application/octet-stream", None)
            if "application/json" in content:
                for key in (*CREATE_FIELDS_ADDED, ENVELOPE):
                    del content["application/json"]["schema"]["properties"][key]


def _in_openapi_3_0(value: Any) -> Any:
    """Say in OpenAPI 3.0 what is said in 3.1, that is in JSON Schema; everything in it is new, nothing shared."""
    if isinstance(value, list):
        return [_in_openapi_3_0(one) for one in value]
    if not isinstance(value, dict):
        return value
    said = {key: _in_openapi_3_0(one) for key, one in value.items()}
    types = said.get("type")
    if isinstance(types, list):
        del said["type"]
        known = [{"type": one, "nullable": "null" in types} for one in types if one != "null"]
        said.update(known[0] if len(known) == 1 else {"anyOf": known})
    if isinstance(said.get("exclusiveMaximum"), float):
        said["maximum"], said["exclusiveMaximum"] = said["exclusiveMaximum"], True
    if "const" in said:
        said["enum"] = [said.pop("const")]
    return said
