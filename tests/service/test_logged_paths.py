"""The path of a call in the log: that of its route, or the beginning of an unknown one, which may hold a secret."""

from types import SimpleNamespace
from typing import Any

import pytest
from sparsectrl_lcm.service.http.middleware.access_log import loggable_path


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
