"""The registration document: valid OpenAPI 3.0 with everything that the platform's proxy needs to know of the table."""

from __future__ import annotations

from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV30SpecValidator

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.registration import registration
from aiida_marketplace_hpc.protocol import CAPABILITIES, CREATE_FIELDS_PUBLISHED, OPERATIONS

SERVER = {"server": "https://hpc.example.org/gateway/"}
NINE = {
    "heartbeat": ("get", "/heartbeat"),
    "createOrUpdateCollection": ("put", "/api/v1/user/create"),
    "newTransformation": ("post", "/api/v1/job/create"),
    "updateTransformation": ("patch", "/api/v1/job/launch/{jobid}"),
    "getTransformationState": ("get", "/api/v1/job/state/{jobid}"),
    "deleteTransformation": ("delete", "/api/v1/job/cancel/{jobid}"),
    "createDataset": ("put", "/api/v1/file/upload/{jobid}"),
    "getDataset": ("get", "/api/v1/file/download/{jobid}"),
    "deleteDataset": ("delete", "/api/v1/file/delete/{jobid}"),
}


def made(*, classic: bool = False, **told: Any) -> dict[str, Any]:
    return registration(load({"registration": told, "name": "Cluster of the lab"}), classic=classic)


def operations(document: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Method and path of each capability, in the document's order; none has two."""
    rows = [
        (one["operationId"], (method, path))
        for path, methods in document["paths"].items()
        for method, one in methods.items()
    ]
    assert len(dict(rows)) == len(rows) == len({place for _, place in rows})
    return dict(rows)


@pytest.mark.parametrize("classic", [False, True])
def test_it_is_valid(classic: bool) -> None:
    document = made(**SERVER, classic=classic)
    assert document["openapi"] == "3.0.3"
    OpenAPIV30SpecValidator(document).validate()


def test_the_validator_would_say_so() -> None:
    document = made(**SERVER)
    del document["paths"]["/api/v1/job/launch/{jobid}"]["patch"]["parameters"][0]
    assert list(OpenAPIV30SpecValidator(document).iter_errors())


def nothing_of_3_1(value: Any) -> None:
    """The validator takes a schema of 3.1 for one of 3.0 with words that it does not know."""
    if isinstance(value, list):
        for one in value:
            nothing_of_3_1(one)
    elif isinstance(value, dict):
        assert not isinstance(value.get("type"), list)
        assert "const" not in value
        assert value.get("exclusiveMaximum") in (None, True)
        assert "nullable" not in value or "type" in value
        for one in value.values():
            nothing_of_3_1(one)


def test_it_is_openapi_3_0_throughout() -> None:
    document = made(**SERVER)
    nothing_of_3_1(document)
    body = document["paths"]["/api/v1/job/create"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["image"]["type"] == "string"
    assert body["properties"]["image"]["nullable"] is True
    assert body["properties"]["ntasks_per_node"]["anyOf"] == [
        {"type": "integer", "nullable": True},
        {"type": "string", "nullable": True},
    ]
    asked = document["paths"]["/api/v1/query"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert asked["properties"]["wait"]["maximum"] == 1e9
    names = [one["properties"]["op"]["enum"] for one in asked["properties"]["operations"]["items"]["oneOf"]]
    assert names == [[name] for name in OPERATIONS]


def test_every_capability_of_the_proxy_and_every_parameter_is_declared() -> None:
    document = made(**SERVER)
    rows = [row for row in CAPABILITIES if row.registered]
    assert operations(document) == {row.name: (row.method.lower(), row.path) for row in rows}
    for row in rows:
        operation = document["paths"][row.path][row.method.lower()]
        declared = {(one["name"], one["in"], one["required"]) for one in operation["parameters"]}
        assert declared == {(one.name, one.where, one.required) for one in row.parameters}
        assert ("requestBody" in operation) is (row.body != "none")
        assert operation.get("security") == (None if row.authenticated else [])
    assert document["security"] == [{"bearerAuth": []}]
    bearer = document["components"]["securitySchemes"]["bearerAuth"]
    assert bearer == {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}


def test_a_classic_one_has_the_nine_as_published() -> None:
    document = made(**SERVER, classic=True)
    assert operations(document) == NINE
    parameters = {
        operation["operationId"]: [one["name"] for one in operation["parameters"]]
        for methods in document["paths"].values()
        for operation in methods.values()
    }
    jobid, both = ["jobid"], ["jobid", "filename"]
    assert list(parameters.values()) == [[], [], [], jobid, jobid, jobid, both, both, both]
    job = document["paths"]["/api/v1/job/create"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert list(job["properties"]) == list(CREATE_FIELDS_PUBLISHED)
    upload = document["paths"]["/api/v1/file/upload/{jobid}"]["put"]["requestBody"]["content"]
    assert list(upload) == ["multipart/form-data"]


def test_what_the_platform_is_told() -> None:
    document = made(
        name="lab-hpc",
        description="Jobs on the cluster of the lab",
        contact="hpc@example.org",
        version="7",
        broker="https://platform.example.org/",
        product=[{"name": "guest", "description": "a week"}, {"name": "full", "id": "4711"}],
    )
    assert document["info"] == {
        "title": "lab-hpc",
        "version": "7",
        "description": "Jobs on the cluster of the lab",
        "x-application-name": "lab-hpc",
        "x-api-version": "0.3.0",
        "x-products": [
            {"name": "guest", "description": "a week", "product-id": ""},
            {"name": "full", "description": "", "product-id": "4711"},
        ],
        "contact": {"email": "hpc@example.org"},
    }
    assert document["servers"] == [{"url": "https://platform.example.org/message-broker"}]


def test_what_it_is_told_by_default() -> None:
    document = made(**SERVER)
    assert document["servers"] == [{"url": "https://hpc.example.org/gateway"}]
    assert document["info"]["x-application-name"] == document["info"]["title"] == "Cluster of the lab"
    assert [product["name"] for product in document["info"]["x-products"]] == ["Cluster of the lab"]


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({}, "--broker"),
        ({**SERVER, "broker": "https://platform.example.org"}, "not both"),
        ({"server": "hpc.example.org"}, "--server"),
        ({"server": "http://hpc.example.org"}, "https"),
        ({"broker": "http://platform.example.org"}, "--broker"),
        ({**SERVER, "product": [{"description": "without a name"}]}, r"registration\.product\.0\.name"),
        ({**SERVER, "contact": "nobody"}, r"registration\.contact"),
        ({**SERVER, "colour": "red"}, r"registration\.colour"),
    ],
)
def test_what_makes_no_sense_is_named(told: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        made(**told)
