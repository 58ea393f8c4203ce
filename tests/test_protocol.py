"""The table of capabilities: what was published stays as it was published."""

from __future__ import annotations

from aiida_marketplace_hpc import errors
from aiida_marketplace_hpc.protocol import BY_NAME, CAPABILITIES, JobState

PUBLISHED = {
    "heartbeat": ("GET", "/heartbeat", set()),
    "createOrUpdateCollection": ("PUT", "/api/v1/user/create", set()),
    "newTransformation": ("POST", "/api/v1/job/create", set()),
    "updateTransformation": ("PATCH", "/api/v1/job/launch/{jobid}", {"jobid"}),
    "getTransformationState": ("GET", "/api/v1/job/state/{jobid}", {"jobid"}),
    "deleteTransformation": ("DELETE", "/api/v1/job/cancel/{jobid}", {"jobid"}),
    "createDataset": ("PUT", "/api/v1/file/upload/{jobid}", {"jobid", "filename"}),
    "getDataset": ("GET", "/api/v1/file/download/{jobid}", {"jobid", "filename"}),
    "deleteDataset": ("DELETE", "/api/v1/file/delete/{jobid}", {"jobid", "filename"}),
}


def test_the_nine_are_as_published() -> None:
    for name, (method, path, parameters) in PUBLISHED.items():
        row = BY_NAME[name]
        assert (row.method, row.path, row.published, row.registered) == (method, path, True, True)
        assert {parameter.name for parameter in row.parameters if parameter.published} == parameters
        assert not {parameter.name for parameter in row.parameters if parameter.required} - parameters


def test_only_two_capabilities_are_added_to_the_registered_ones() -> None:
    assert {row.name for row in CAPABILITIES if row.registered} - set(PUBLISHED) == {"getInfo", "query"}


def test_one_name_one_request() -> None:
    assert len(BY_NAME) == len(CAPABILITIES)
    assert len({(row.method, row.path) for row in CAPABILITIES}) == len(CAPABILITIES)


def test_a_state_is_final_or_active_or_created() -> None:
    for state in JobState:
        assert [state.final, state.active, state is JobState.CREATED].count(True) == 1


def all_errors(cls: type[errors.GatewayError]) -> list[type[errors.GatewayError]]:
    return [cls, *(found for below in cls.__subclasses__() for found in all_errors(below))]


def test_every_error_survives_the_wire() -> None:
    for cls in all_errors(errors.GatewayError)[1:]:
        extra = {"errno": "ENOENT", "path": "/x"} if cls is errors.FileError else {}
        sent = cls("what happened", request_id="abc", **extra)  # type: ignore[arg-type]
        received = errors.from_wire(sent.status, sent.to_wire())
        assert type(received) is cls
        assert received.to_wire() == sent.to_wire()


def test_a_proxys_page_becomes_an_error_of_its_status() -> None:
    assert isinstance(errors.from_wire(502, "<html>bad gateway</html>"), errors.Unavailable)
    assert isinstance(errors.from_wire(401, ""), errors.Unauthorized)
    assert isinstance(errors.from_wire(600, {"error": "x"}), errors.ServerFault)


def test_a_file_error_becomes_pythons_own() -> None:
    error = errors.from_wire(409, {"error": "gone", "code": "file_error", "errno": "ENOENT", "path": "/x"})
    assert isinstance(error, errors.FileError)
    assert isinstance(error.to_os_error(), FileNotFoundError)
