"""The service put together, and its listeners."""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Any

from ..runtime.errors import BackendError, InvalidRequest, reason_of
from .addresses import Allowed
from .app import create_app
from .board import Board
from .context import Service
from .dispatch import Dispatcher
from .files import open_files
from .keys import Keyring
from .listeners import Listener, make_server
from .metrics import Metrics
from .runner import LocalRunner, Runner
from .settings import SQLITE, Settings
from .signing import Signer
from .store import SqlStore
from .uploads import remove_stale_uploads
from .webhooks import Webhooks

SWEEP_SECONDS = 60.0
FIRST_FILES = {"files", "lock", "owner.new", "work"}
"""What a first start may leave in the data folder before the server has its name there."""
BEFOREHAND = {"lost+found", "tls"}
"""What may be there before: a disk of its own has the one; who brings an authority that clients trust, the other."""
_OWNER = re.compile(rb"[0-9a-f]{32}\s*")

log = logging.getLogger("sparsectrl_lcm.service")


def local_runner(settings: Settings) -> Runner:
    """The runner that the settings ask for."""
    settings.work.mkdir(parents=True, exist_ok=True)
    return LocalRunner(
        pipeline=settings.pipeline,
        bundle=settings.bundle,
        backend=settings.backend,
        precision=settings.precision,
        threads=settings.threads,
        image_pixels=settings.image_pixels,
        step_seconds=settings.step_seconds,
        start_seconds=settings.start_seconds,
        work=settings.work,
    )


def open_service(settings: Settings, runner: Runner | None = None) -> Service:
    """Opens the store and the files; nothing runs yet.

    Raises:
        ValueError: an entry of `allow_private` is no host, address or network.
    """
    Allowed.parse(settings.allow_private)
    settings.data.mkdir(0o700, parents=True, exist_ok=True)
    store = SqlStore(settings.database_url)
    metrics = Metrics()
    return Service(
        settings=settings,
        store=store,
        files=open_files(settings.files_url),
        runner=runner or local_runner(settings),
        board=Board(store, _owner(settings.data), metrics, settings.key_unstarted),
        keyring=Keyring(store),
        signer=Signer(store.secret("webhooks")),
        metrics=metrics,
        secret=store.secret("tokens"),
    )


@contextlib.asynccontextmanager
async def running(service: Service) -> AsyncIterator[Dispatcher]:
    """Runner, dispatcher, webhooks and sweeper, until the block ends."""
    dispatcher, webhooks = Dispatcher(service), Webhooks(service)
    await service.runner.start()
    await dispatcher.start()
    await webhooks.start()
    sweeper = asyncio.ensure_future(_sweep(service))
    try:
        yield dispatcher
    finally:
        sweeper.cancel()
        await dispatcher.drain(service.settings.drain_seconds)
        await webhooks.stop()
        await service.runner.stop()
        service.board.close()
        service.store.close()


async def serve(
    settings: Settings,
    listeners: list[Listener],
    runner: Runner | None = None,
    on_open: Callable[[Service], None] = lambda _: None,
) -> None:
    """Serves until SIGTERM or SIGINT; then takes no more, lets the running request end, and keeps the rest.

    Args:
        settings: how it runs.
        listeners: where it listens.
        runner: what makes the clips; None takes the one that the settings ask for.
        on_open: called as soon as the data folder and all addresses are this server's.

    Raises:
        InvalidRequest: the data folder cannot be used, is no server's or another's, or the settings name a database
            or a store of files that cannot be opened.
        BackendError: no model was there yet, and the runner says that with these settings there will be none.
        OSError: an address cannot be listened on.
    """
    with _lock(settings.data), contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(listener.bind()) for listener in listeners]
        for left in (settings.work, settings.data / "tmp"):  # by an earlier server
            shutil.rmtree(left, ignore_errors=True)
        service = open_service(settings, runner)
        app = create_app(service)
        servers = [make_server(app, settings, listener) for listener in listeners]
        on_open(service)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with running(service) as dispatcher:
            tasks = [asyncio.ensure_future(s.serve([sock])) for s, sock in zip(servers, bound, strict=True)]
            waiter, refused = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(service.runner.refused())
            await asyncio.wait([waiter, refused, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if not refused.done():
                log.info("draining")
            waiter.cancel()
            refused.cancel()
            await dispatcher.drain(settings.drain_seconds)  # states and results are told meanwhile
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*tasks)
        if not refused.cancelled() and refused.done():
            raise BackendError(refused.result())


@contextlib.contextmanager
def _lock(data: Path) -> Any:
    """One server per data folder; the system lets go of it with the process, however that ends."""
    file: IO[str]
    try:
        data.mkdir(parents=True, exist_ok=True)
        if (foreign := _foreign(data)) is not None:
            mend = "give a new or empty folder, or a server's"
            raise InvalidRequest(f"--data {data}: has {foreign!r} in it and is no server's; {mend}")
        with contextlib.suppress(PermissionError):  # it is another user's
            data.chmod(0o700)  # requests, files and secrets are nobody else's
        file = (data / "lock").open("w")
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else reason_of(error)
        raise InvalidRequest(f"--data {data}: cannot be used ({reason}); give a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidRequest(f"--data {data}: another server uses this folder; give another, or end it") from None
        yield


def _foreign(data: Path) -> str | None:
    """A name for which a folder cannot become a server's: parts of it are emptied, and all of it is made private."""
    names = {path.name for path in data.iterdir()}
    owner = data / "owner"  # there even where the database is elsewhere
    if SQLITE in names or (owner.is_file() and _OWNER.fullmatch(owner.read_bytes()) is not None):
        return None
    allowed = BEFOREHAND | (FIRST_FILES if "lock" in names else set())
    return min(
        (name for name in names - allowed if not name.startswith(".") and not name.endswith(".log")), default=None
    )


def _owner(data: Path) -> str:
    """The name under which this data folder's server takes requests, the same on every start."""
    path, new = data / "owner", data / "owner.new"
    name = path.read_text().strip() if path.exists() else ""
    if not name:
        name = uuid.uuid4().hex
        with new.open("w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    return name


async def _sweep(service: Service) -> None:
    settings = service.settings
    while True:
        try:
            now = time.time()
            await asyncio.to_thread(remove_stale_uploads, service, now)
            before = (now - settings.request_seconds, now - settings.private_seconds)
            while gone := await service.board.call(service.store.forget, *before):
                service.board.told(gone)
        except Exception:
            log.exception("the sweep failed")
        await asyncio.sleep(SWEEP_SECONDS)
