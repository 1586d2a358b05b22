"""The command `sparsectrl-lcm serve`, started again whenever it ends, as systemd would."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from sparsectrl_lcm.service.auth.api_keys import create_key
from sparsectrl_lcm.service.store import SqlStore

from .conftest import HERE, Listening, ports

MAIN = """
from functools import partial
from sparsectrl_lcm.cli import main
from sparsectrl_lcm.service import settings
settings.Settings = partial(settings.Settings, pipeline="fakes.marked_pipeline:load")
main()
"""
"""The command line, with a pipeline that takes a tenth of a second."""
RESTART_SECONDS = 0.5
FREE_BYTES = 4 * 2**20
"""With less free space the server refuses new requests: a part of the small disk that the tests give it."""


@dataclass
class SupervisedServer(Listening):
    """`serve` with a folder for its data. `logs` gets its log, and a line for each clip that was made."""

    data: Path
    logs: Path
    database: str | None
    runners: int
    ended: list[int] = field(default_factory=list)
    """The exit code of each process that has ended."""

    def __post_init__(self) -> None:
        self.port = ports()[0]
        self.logs.mkdir(parents=True, exist_ok=True)
        self.made.touch()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    def __enter__(self) -> "SupervisedServer":
        self._supervisor.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._supervisor.join(60)

    @property
    def made(self) -> Path:
        return self.logs / "made"

    @property
    def log(self) -> str:
        return (self.logs / "server.log").read_text()

    def _supervise(self) -> None:
        command = [sys.executable, "-c", MAIN, "serve", "--data", str(self.data), "--port", str(self.port)]
        command += ["--allow-private", "127.0.0.1", "--runners", str(self.runners), "--set", f"free_bytes={FREE_BYTES}"]
        command += ["--database", self.database] if self.database else []
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "MADE": str(self.made)}
        while not self._stopping.is_set():
            with (self.logs / "server.log").open("ab") as log:
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=environment, start_new_session=True
                )
                self.ended.append(self._process.wait())
            self._stopping.wait(RESTART_SECONDS)

    def new_key(self) -> str:
        store = SqlStore(self.database or f"sqlite:///{self.data / 'service.sqlite3'}")
        try:
            return create_key(store, "chaos")
        finally:
            store.close()

    def wait_until_ready(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log[-3000:])

    def kill(self) -> None:
        """Kills the process, as a loss of power would. The supervisor starts the next one."""
        assert self._process is not None
        self._process.kill()

    def stop(self) -> int:
        """Ends the server in order and returns its exit code."""
        self._stopping.set()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
        self._supervisor.join(60)
        assert not self._supervisor.is_alive(), self.log[-3000:]
        return self.ended[-1]
