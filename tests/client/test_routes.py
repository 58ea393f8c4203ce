"""Where each capability's request goes, on both routes."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from aiida_marketplace_hpc.client.routes import DirectRoute, ProxyRoute
from aiida_marketplace_hpc.errors import ConfigurationError, InvalidRequest, NotSupported
from aiida_marketplace_hpc.protocol import CAPABILITIES, Capability

NAMES = [capability.name for capability in CAPABILITIES]


def parameters_of(capability: Capability) -> dict[str, str | int | bool]:
    values: dict[str, str | int | bool] = {"string": "a b/ü", "integer": 420, "boolean": True}
    return {parameter.name: values[parameter.type] for parameter in capability.parameters}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=NAMES)
def test_direct_route_follows_the_table(capability: Capability) -> None:
    target = DirectRoute("https://hpc.example.org/gateway/").target(capability.name, parameters_of(capability))
    assert target.method == capability.method
    parts = urlsplit(target.full_url)
    assert (parts.scheme, parts.netloc) == ("https", "hpc.example.org")
    assert parts.path == "/gateway" + capability.path.replace("{jobid}", "a%20b%2F%C3%BC")
    in_query = {parameter.name for parameter in capability.parameters if parameter.where == "query"}
    assert set(parse_qs(parts.query)) == in_query


@pytest.mark.parametrize("capability", [row for row in CAPABILITIES if row.registered], ids=lambda row: row.name)
def test_proxy_route_sends_every_parameter_in_the_query(capability: Capability) -> None:
    target = ProxyRoute("https://mp.example.org/", "app-1").target(capability.name, parameters_of(capability))
    assert target.method == capability.method
    assert target.url == f"https://mp.example.org/api/applications/proxy/app-1/{capability.name}"
    assert {name for name, _ in target.parameters} == {parameter.name for parameter in capability.parameters}


@pytest.mark.parametrize("capability", [row for row in CAPABILITIES if not row.registered], ids=lambda row: row.name)
def test_proxy_route_refuses_what_is_not_registered(capability: Capability) -> None:
    route = ProxyRoute("https://mp.example.org", "app-1")
    assert not route.offers(capability.name)
    with pytest.raises(NotSupported, match=capability.name):
        route.target(capability.name, parameters_of(capability))


def test_values_are_written_as_the_wire_wants_them() -> None:
    target = DirectRoute("http://h").target(
        "createDataset",
        {"jobid": "home", "filename": "a&b=c", "bundle": True, "overwrite": False, "mode": 0o644, "into": None},
    )
    assert target.full_url.endswith("/upload/home?filename=a%26b%3Dc&bundle=true&overwrite=false&mode=420")


def test_names_that_are_not_utf8_keep_their_bytes() -> None:
    target = DirectRoute("http://h").target("getDataset", {"jobid": "home", "filename": "n\udcff"})
    assert target.full_url.endswith("?filename=n%FF")


@pytest.mark.parametrize("jobid", ["", ".", ".."])
def test_dot_segments_cannot_ask_for_something_else(jobid: str) -> None:
    with pytest.raises(InvalidRequest):
        DirectRoute("http://h").target("deleteTransformation", {"jobid": jobid})


def test_missing_and_unknown_parameters_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="needs filename"):
        DirectRoute("http://h").target("getDataset", {"jobid": "home"})
    with pytest.raises(KeyError):
        DirectRoute("http://h").target("heartbeat", {"filename": "x"})


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hpc.example.org",
        "ftp://hpc.example.org",
        "https://",
        "https://user:s3cret@hpc.example.org",
        "https://hpc.example.org?x=1",
        "https://hpc.example.org/#top",
        "https://hpc example.org",
        "https://hpc.example.org:port",
    ],
)
def test_malformed_addresses_are_refused_without_showing_a_password(url: str) -> None:
    for make in (DirectRoute, lambda address: ProxyRoute(address, "app")):
        with pytest.raises(ConfigurationError) as raised:
            make(url)
        assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("app_id", ["", "a/b", "..", "a b"])
def test_malformed_app_id_is_refused(app_id: str) -> None:
    with pytest.raises(ConfigurationError, match="app_id"):
        ProxyRoute("https://mp.example.org", app_id)
