"""A real server in a separate process, and helpers to call it."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fakes.missing_programs import missing
from fakes.postgresql_server import postgresql
from free_ports import free_ports
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.queue import dispatcher as dispatch
from sparsectrl_lcm.service.queue import periodic_work, retries
from sparsectrl_lcm.service.store import SqlStore
from sparsectrl_lcm.service.store import database as database_module

from .holds import Hold
from .server_process import start_server
from .waiting import SECONDS

if TYPE_CHECKING:
    from .test_webhooks import Receiver

APP = "fal-ai/animatediff-sparsectrl-lcm"
HERE = Path(__file__).parent
FAKES = HERE.parent / "fakes"
PACKAGES = HERE / "javascript"
"""package.json of npm, and the lockfile with the checksums."""
CACHE = HERE.parents[1] / ".cache/npm"


class Listening:
    """The URLs of a server on a port of this machine."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def queue(self) -> str:
        return f"{self.url}/queue/{APP}"


@dataclass
class Server(Listening):
    """`serve` with three listeners. It can be killed and started again on the same data."""

    data: Path
    options: dict[str, Any]
    port: int = 0
    queue_port: int = 0
    tls_port: int = 0
    process: BaseProcess | None = field(default=None, repr=False)
    key: str = ""

    @property
    def ca(self) -> Path:
        return self.data / "tls/ca.pem"

    @property
    def log(self) -> str:
        """Its whole lines so far."""
        text = self._log.read_text()
        return text[: text.rfind("\n") + 1]

    @property
    def _log(self) -> Path:
        return self.data.with_name("server.log")  # not in the data folder, which only the server writes to

    def headers(self, key: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Key {key or self.key}"}

    def start(self) -> None:
        self.data.parent.mkdir(parents=True, exist_ok=True)
        if not self.port:
            self.port, self.queue_port, self.tls_port = ports()
        listening = (self.port, self.queue_port, self.tls_port)
        self.process = start_server(listening, self.data, self._log, FAKES, **self.options)
        self.wait("/healthz")

    def wait(self, path: str = "/readyz", seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process is not None and self.process.is_alive(), self.log
            try:
                if httpx.get(self.url + path, timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(self.log)

    def kill(self) -> None:
        """Kills the server at once, as a loss of power would."""
        assert self.process is not None
        self.process.kill()
        self.process.join()

    def stop(self) -> int | None:
        """Asks the server to stop and returns its exit code, or None if it still runs after a minute."""
        assert self.process is not None
        self.process.terminate()
        self.process.join(SECONDS)
        return self.process.exitcode

    def new_key(self, name: str = "test") -> str:
        command = ["keys", "create", "--data", str(self.data), "--name", name]
        if "database" in self.options:
            command += ["--database", self.options["database"]]
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # a process would mostly import
            assert run(command) == 0
        made = printed.getvalue().strip()
        assert re.fullmatch(r"[0-9a-f]{16}:[\w-]{43}", made)
        return made


def ports() -> tuple[int, int, int]:
    one, another, third = free_ports(3)
    return one, another, third


def started(folder: Path, port: int = 0, **options: Any) -> Iterator[Server]:
    options = {"allow_private": ["127.0.0.1"], "image_seconds": SECONDS, **options}
    server = Server(folder / "data", options, port, *(ports()[1:] if port else ()))
    try:
        server.start()
        server.key = server.new_key()
        yield server
    finally:
        if server.process is not None and server.process.is_alive() and server.stop() is None:
            server.kill()


def manifest_alone(folder: Path, frames: int = 16) -> Path:
    """Writes the demo bundle's manifest with another length of clips, and without what the model was trained for.

    That is enough for a server with a stub pipeline.
    """
    manifest = json.loads((demo_bundle() / "manifest.json").read_text())
    manifest["sizes"]["frames"] = frames
    del manifest["trained_for"]
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def stub_server(tmp_path_factory: pytest.TempPathFactory, **more: Any) -> Iterator[Server]:
    """A server with a stub pipeline, which does what the prompt says."""
    options = {"pipeline": "stub_pipeline:load", "step_seconds": 10.0, "webhook_seconds": SECONDS}
    yield from started(tmp_path_factory.mktemp("stub"), weights={APP: {"anime": "bundle"}}, **options, **more)


def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo bundle."""
    for server in started(tmp_path_factory.mktemp("demo"), backend="onnxruntime"):
        server.wait()
        yield server


stub = pytest.fixture(scope="module")(stub_server)
demo = pytest.fixture(scope="module")(demo_server)


@pytest.fixture(scope="session", autouse=True)
def _patient_clients() -> Iterator[None]:
    """Clients of httpx wait longer than its 5 seconds, which a server on a busy machine may need for an answer."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "read", "write", "pool"):
            patch.setattr(DEFAULT_TIMEOUT_CONFIG, name, SECONDS)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_tls_context() -> Iterator[None]:
    """Clients of httpx share what they trust by default: each would read all certificates, for 0.04 s."""
    create = httpx.create_ssl_context
    trusted = cache(lambda *names: create())

    def shared(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
        if verify is not True or cert or not trust_env:
            return create(verify, cert, trust_env)
        return trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", shared)
        yield


@pytest.fixture(scope="session")
def _new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SQLite with all tables and no rows."""
    path = tmp_path_factory.mktemp("database") / "new.sqlite3"
    SqlStore(f"sqlite:///{path}").close()
    return path


@pytest.fixture(autouse=True)
def _copied_databases(_new_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New databases of SQLite are copies of one, since creating the tables takes longer than most tests."""
    make = database_module._make_private

    def copy(path: Path) -> None:
        is_new = not path.exists()
        make(path)
        if is_new:
            shutil.copyfile(_new_database, path)

    monkeypatch.setattr(database_module, "_make_private", copy)


@pytest.fixture(scope="session")
def modules() -> Path:
    """A folder with the packages of npm."""
    from filelock import FileLock

    npm = shutil.which("npm") or missing("npm")
    lockfile = (PACKAGES / "package-lock.json").read_bytes()
    folder = CACHE / hashlib.sha256(lockfile).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "installed").exists():
            for path in PACKAGES.iterdir():
                shutil.copy(path, folder)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            (folder / "installed").touch()
    return folder


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """The URL of a PostgreSQL server, which all tests share."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has to be short
        yield from postgresql(Path(folder))


@pytest.fixture
def hook() -> "Iterator[Receiver]":
    """A receiver of webhooks, for tests of the clients."""
    from .test_webhooks import Receiver

    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    url = f"sqlite:///{tmp_path / 'a.sqlite3'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("database")
    opened = SqlStore(url)
    end_all(opened)
    yield opened
    end_all(opened)
    opened.close()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Holds clips of a stub pipeline, at the latest until the end of the test."""
    made = Hold(tmp_path / "steps")
    yield made
    made.let_go()


def end_all(store: SqlStore) -> None:
    """Ends what waits in a database that tests share, so that no later server of theirs begins with it."""
    for request_id in store.waiting(APP):
        store.cancel(request_id, 0.0)
    for webhook in store.due_webhooks(1e12, 60.0, 1000):
        store.webhook_tried(webhook, None, None)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers notice at once what they look for from time to time."""
    monkeypatch.setattr(periodic_work, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "READY_SECONDS", 0.02)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.02)
