"""A source that is no folder and not on the hub is told before the loaders try for a minute."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.export import hub_names


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: it has `owner/model` and no other model."""

    def do_GET(self) -> None:
        known = self.path.startswith("/api/models/owner/model")
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(b'{"id": "owner/model"}' if known else b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    hub_names.fault_of_hub_name.cache_clear()
    yield
    hub_names.fault_of_hub_name.cache_clear()


def test_the_command_line_says_that_the_hub_cannot_be_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    assert run(["export", "--base", "nofolder", "--motion-adapter", "nofolder", "-o", str(output)]) == 2
    reason = "there is no such folder, and the hub cannot be reached"
    assert capsys.readouterr().err == f"error: --base: cannot load 'nofolder': {reason}\n"


def test_what_the_hub_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        unknown = "there is no such folder, and no such model on the hub"
        assert hub_names.fault_of_hub_name("owner/model") == ""
        assert hub_names.fault_of_hub_name("nofolder") == unknown
        assert hub_names.fault_of_hub_name("no folder") == unknown
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_without_the_hub_its_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "cache/models--owner--model").mkdir(parents=True)
    assert hub_names.fault_of_hub_name("owner/model") == ""
    assert "HF_HUB_OFFLINE turns the hub off" in hub_names.fault_of_hub_name("owner/other")
