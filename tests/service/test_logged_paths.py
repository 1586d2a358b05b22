"""A call in the log: the path of its route, or the beginning of an unknown one, which may hold a secret; its level."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sparsectrl_lcm.service.http.middleware.access_log import AccessLog, loggable_path


@pytest.mark.parametrize(
    ("scope", "logged"),
    [
        (
            {"path": "/files/1/x.mp4", "route": SimpleNamespace(path="/files/{file_id}/{file_name}")},
            "/files/{file_id}/{file_name}",
        ),
        ({"path": "/"}, "/"),
        ({"path": "/unknown"}, "/unknown"),
        ({"path": "/unknown/secret"}, "/unknown/..."),
        ({"path": "/unknown/a/secret"}, "/unknown/..."),
        ({"path": "/" + "x" * 41}, "/" + "x" * 40),
    ],
)
def test_a_log_shows_no_more(scope: dict[str, Any], logged: str) -> None:
    assert loggable_path(scope) == logged


@pytest.mark.parametrize(
    ("path", "status", "level"),
    [("/readyz", 200, "DEBUG"), ("/readyz", 503, "INFO"), ("/metrics", 401, "INFO"), ("/files/{file_id}", 200, "INFO")],
)
def test_probes_that_succeed_are_for_debugging(
    path: str, status: int, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status})

    async def nothing(*_: Any) -> None: ...

    caplog.set_level("DEBUG", "sparsectrl_lcm.service.http")
    scope = {"type": "http", "method": "GET", "route": SimpleNamespace(path=path), "state": {"request_id": "1"}}
    asyncio.run(AccessLog(app)(scope, nothing, nothing))
    assert [(record.message, record.levelname) for record in caplog.records] == [("answered", level)]
