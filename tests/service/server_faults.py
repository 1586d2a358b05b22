"""What happens to a server: it is killed, its database ends or falls silent, its disk is full."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes import postgresql_server

from .supervised_server import SupervisedServer
from .waiting import wait_until

FREEZE_SECONDS, DOWN_SECONDS, FULL_SECONDS = 60.0, 4.0, 8.0
DISK = "32m"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mounts a file system of `DISK` bytes in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@dataclass
class Faults:
    """What happens to a server. `spans` has the times at which each began and ended, as `time.time`.

    `disk` is the file system of its data, `database` the folder of its PostgreSQL.
    """

    server: SupervisedServer
    disk: Path
    database: Path | None
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def run(self, name: str) -> None:
        fault: Callable[[], None] = getattr(self, name)
        begun = time.time()
        fault()
        self.spans.append((name, begun, time.time()))

    def kill(self) -> None:
        self.server.kill()
        self.server.wait_until_ready()

    def crash_database(self) -> None:
        assert self.database is not None
        postgresql_server.stop(self.database, "immediate")
        time.sleep(DOWN_SECONDS)
        postgresql_server.start(self.database)

    def kill_without_database(self) -> None:
        """The server is killed while its database restarts, so that its next start fails."""
        assert self.database is not None
        postgresql_server.stop(self.database, "fast")
        ended = len(self.server.ended)
        self.server.kill()
        wait_until(lambda: self.server.ended[ended + 1 :] == [2], 120, "the server did not start without its database")
        postgresql_server.start(self.database)
        self.server.wait_until_ready()

    def freeze_database(self) -> None:
        assert self.database is not None
        with postgresql_server.frozen(self.database):
            time.sleep(FREEZE_SECONDS)

    def fill_disk(self) -> None:
        with self._full_disk():
            time.sleep(FULL_SECONDS)

    def kill_on_full_disk(self) -> None:
        with self._full_disk():
            time.sleep(FULL_SECONDS / 2)
            self.server.kill()
            time.sleep(FULL_SECONDS / 2)
        self.server.wait_until_ready()

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file:
            size = 2**20
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2
            yield
        filler.unlink()
