"""Swagger UI at /docs: only if it is asked for, and from this server alone."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime.errors import InvalidRequest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.routes import api_docs
from sparsectrl_lcm.service.server import open_service
from sparsectrl_lcm.service.settings import Settings
from starlette.testclient import TestClient

from ..conftest import APP, missing, started
from ..stand_in import StandIn


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_docs, "find_spec", lambda _: None)
    with pytest.raises(InvalidRequest) as told:
        api_docs.make_router([APP])
    assert str(told.value) == "docs: the page needs swagger-ui-bundle; run: pip install swagger-ui-bundle"


def test_a_request_from_swagger_ui(page: Any, tmp_path: Path) -> None:
    if find_spec("swagger_ui_bundle") is None:
        missing("swagger-ui-bundle")
    for server in started(tmp_path, pipeline="stub_pipeline:load", docs=True):
        page.goto(f"{server.url}/docs")
        page.locator(".opblock").nth(3).wait_for()
        assert page.locator(".opblock-summary-path").all_inner_texts()[0].replace("\u200b", "") == f"/{APP}"
        page.click("button.authorize")
        page.fill(".auth-container input", f"Key {server.key}")
        page.click(".auth-btn-wrapper .authorize")
        page.click(".btn-done")
        page.locator(".opblock-summary-path").first.click()
        page.click(".try-out button")
        page.fill(".body-param textarea", '{"prompt": "a"}')
        page.click("button.execute")
        answer = page.locator(".live-responses-table .response-col_description pre").first
        answer.wait_for()
        assert '"status": "IN_QUEUE"' in answer.inner_text()
        assert {url.startswith((server.url, "data:")) for url in page.asked} == {True}
        assert page.problems == []


def test_without_the_option_there_is_no_such_page(tmp_path: Path) -> None:
    service = open_service(Settings(tmp_path), StandIn())
    client = TestClient(create_app(service))
    assert [client.get(path).status_code for path in ("/docs", "/docs/start.js")] == [404, 404]
    service.store.close()
