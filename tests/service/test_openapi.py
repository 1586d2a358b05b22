"""Requests that schemathesis generates from the OpenAPI document cause no server error; answers conform to it."""

import re
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .conftest import APP, Server
from .holds import Hold
from .waiting import SECONDS, wait_until

CONFORMANCE: list[Any] = [
    checks.not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
"""Without the check that wrong input is refused: the queue accepts it, as fal's does, and the result is the error."""

ONE = "/requests/{request_id}"


@pytest.fixture(scope="module")
def document(stub: Server) -> Any:
    stub.wait()
    read = schemathesis.openapi.from_url(f"{stub.url}/openapi.json")
    read.config.update(request_timeout=SECONDS)
    return read


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", ["submit", "result", "status", "cancel"])
def test_any_request(document: Any, stub: Server, operation: str, mode: GenerationMode) -> None:
    path = f"/{APP}" + {"submit": "", "result": ONE}.get(operation, f"{ONE}/{operation}")
    method = {"submit": "POST", "cancel": "PUT"}.get(operation, "GET")

    @settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(document[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(headers=stub.headers(), checks=[*CONFORMANCE, ignored_auth])

    check()


def test_the_schemas_are_whole(stub: Server) -> None:
    """Code generators need what is required, fal's page the order of the fields and what they mean."""
    document = httpx.get(f"{stub.url}/openapi.json").json()
    assert re.fullmatch(r"\d+\.\d+\.\d+", document["info"]["version"])
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        assert set(schema.get("required", [])) <= set(schema["properties"])
    assert schemas["QueueStatus"]["required"] == ["status", "request_id"]
    fields = schemas["AnimatediffSparsectrlLcmInput"]
    assert [name for name, field in fields["properties"].items() if "description" not in field] == []
    for title in ("AnimatediffSparsectrlLcmInput", "AnimatediffSparsectrlLcmOutput"):
        assert schemas[title]["x-fal-order-properties"] == list(schemas[title]["properties"])


def test_requests_that_exist(document: Any, stub: Server, hold: Hold) -> None:
    """Generated ids are unknown. These belong to requests that have succeeded, failed, or not ended yet."""
    with httpx.Client(headers=stub.headers(), timeout=30) as client:
        inputs = [{"prompt": "a"}, {"prompt": 1}, {"prompt": "fail"}, {"prompt": hold.prompt}, {"prompt": "a"}]
        ids = [client.post(stub.queue, json=given).json()["request_id"] for given in inputs]
    seen = set()
    for _ in range(2):
        for request_id in ids:
            for operation in (result.ok() for result in document.get_all_operations()):
                if "{request_id}" in operation.path and (operation.method != "put" or request_id == ids[-1]):
                    case = operation.Case(path_parameters={"request_id": request_id})
                    response = case.call(headers=stub.headers())
                    case.validate_response(response, checks=CONFORMANCE[1:])  # one of the results is a 500
                    seen.add((operation.path.rpartition("/")[2], response.status_code))
        with httpx.Client(headers=stub.headers()) as client:
            client.put(f"{stub.queue}/requests/{ids[3]}/cancel")
            wait_until(lambda: client.get(f"{stub.queue}/requests/{ids[3]}/status").status_code != 202)
    assert seen >= {
        ("status", 200),
        ("status", 202),
        ("{request_id}", 200),
        ("{request_id}", 400),
        ("{request_id}", 422),
        ("{request_id}", 500),
        ("{request_id}", 499),
        ("cancel", 202),
        ("cancel", 400),
    }
