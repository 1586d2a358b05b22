"""Puts the service together and runs it: store, runners, dispatchers, webhooks, sweeper and listeners."""

import asyncio
import contextlib
import logging
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence

from ..runtime.errors import InvalidRequest, SparseCtrlLcmError
from . import clock
from .app import create_app
from .auth.api_keys import Keyring
from .auth.webhook_signatures import Signer
from .components import Endpoint, Service
from .data_folder import locked, owner_name, remove_written
from .http.accept_failures import AcceptFailures
from .http.body_slots import BodySlots
from .http.listeners import Listener, make_server
from .http.tls_certificates import follow_certificates
from .json_logs import logs_of
from .metrics import Metrics
from .network.public_addresses import Allowed
from .network.webhook_delivery import Webhooks
from .objects.object_stores import check_files, open_files
from .objects.stored_files import remove_expired_files
from .queue.dispatchers import Dispatchers
from .queue.request_states import Board
from .runner import Runner
from .runner.bundle_cache import bundle_manifest
from .runner.make_runners import make_runners
from .settings import Settings
from .store import STORE_FAILURES, OwnerLock, SqlStore
from .systemd import Systemd

SWEEP_SECONDS = 60.0
LOADED_SECONDS = 0.1
"""How often to look whether all endpoints have loaded a model."""

log = logging.getLogger("sparsectrl_lcm.service")


def open_service(settings: Settings, *runners: Runner) -> Service:
    """Opens the stores and creates the service. Nothing runs yet.

    Args:
        settings: the settings.
        runners: make the clips, one for each endpoint; none means those that the settings ask for.

    Raises:
        InvalidRequest: the settings name a database that cannot be opened or an object store that cannot be used,
            another server has a copy of the data folder, or an entry of `allow_private` is not a host, address or
            network.
        BundleError: the manifest of a bundle cannot be read.
        SQLAlchemyError: the database cannot be reached or written.
    """
    Allowed.parse(settings.allow_private)
    manifests = {name: bundle_manifest(bundle) for name, bundle in settings.endpoints.items()}
    settings.data.mkdir(0o700, parents=True, exist_ok=True)
    files = open_files(settings.files_url)
    if settings.files is not None:
        check_files(settings.files, files)
    store = SqlStore(settings.database_url)
    owner_lock = _lock_owner(settings, store)
    store.make_shrinkable()
    metrics = Metrics()
    board = Board(store, owner_lock.owner, metrics, settings.endpoints, settings.key_unstarted)
    made = zip(settings.endpoints, runners or make_runners(settings), strict=True)
    return Service(
        settings=settings,
        store=store,
        owner_lock=owner_lock,
        files=files,
        endpoints={name: Endpoint(name, runner, board.queues[name], manifests[name]) for name, runner in made},
        board=board,
        keyring=Keyring(store),
        signer=Signer(store.secret("webhooks")),
        metrics=metrics,
        secret=store.secret("tokens"),
        bodies=BodySlots(settings.uploads, settings.key_uploads, settings.body_seconds),
    )


def _lock_owner(settings: Settings, store: SqlStore) -> OwnerLock:
    """Takes the lock of this data folder's name in the database."""
    lock = OwnerLock(store.engine, owner_name(settings.data))
    if not lock.take():
        store.close()
        reason = f"a server with {settings.data} or a copy of it uses the database"
        raise InvalidRequest("data", reason, "end that server, or give this one a new folder")
    return lock


@contextlib.asynccontextmanager
async def running(service: Service) -> AsyncIterator[Dispatchers]:
    """Runs runners, dispatchers, webhooks and sweeper until the block ends."""
    dispatchers, webhooks = Dispatchers(service), Webhooks(service)
    for name, endpoint in service.endpoints.items():
        with logs_of(endpoint=name):
            await endpoint.runner.start()
    await dispatchers.start()
    await webhooks.start()
    sweeper = asyncio.ensure_future(_sweep(service))
    try:
        yield dispatchers
    finally:
        sweeper.cancel()
        await dispatchers.drain(service.settings.drain_seconds)
        await webhooks.stop()
        await asyncio.gather(*(endpoint.runner.stop() for endpoint in service.endpoints.values()))
        service.owner_lock.close()
        service.store.close()


async def serve(
    settings: Settings,
    listeners: list[Listener],
    runners: Sequence[Runner] = (),
    on_open: Callable[[Service], None] = lambda _: None,
    on_loaded: Callable[[Service], None] = lambda _: None,
) -> None:
    """Serves until SIGTERM or SIGINT. Then it finishes the running request and keeps the rest for the next start.

    A second SIGINT ends the process at once.

    Args:
        settings: the settings.
        listeners: the addresses to listen on.
        runners: as `open_service` takes them.
        on_open: called once the data folder is locked and all addresses are bound.
        on_loaded: called, in a thread, once every endpoint has a model loaded.

    Raises:
        InvalidRequest: the data folder cannot be used, or as `open_service`.
        SparseCtrlLcmError: an endpoint's model cannot be loaded with these settings.
        OSError: an address cannot be used.
    """
    with locked(settings.data) as is_new, contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(listener.bind()) for listener in listeners]
        for folder in (settings.work, settings.incoming):  # an earlier process may have left files
            shutil.rmtree(folder, ignore_errors=True)
        service = open_service(settings, *runners)
        app = create_app(service)
        servers = [make_server(app, settings, listener) for listener in listeners]
        on_open(service)
        asyncio.get_running_loop().set_exception_handler(AcceptFailures())
        stop, systemd = _stop_signal(settings.drain_seconds), Systemd()
        watching = asyncio.ensure_future(systemd.watch())
        async with running(service) as dispatchers:
            tasks = [asyncio.ensure_future(s.serve([sock])) for s, sock in zip(servers, bound, strict=True)]
            systemd.tell("READY=1", "STATUS=loads the model")
            refused = asyncio.ensure_future(_refused(service))
            beside = [
                asyncio.ensure_future(stop.wait()),
                refused,
                asyncio.ensure_future(_once_loaded(service, on_loaded, systemd)),
                asyncio.ensure_future(follow_certificates(each.tls for each in listeners if each.tls is not None)),
            ]
            await asyncio.wait([*beside[:2], *tasks], return_when=asyncio.FIRST_COMPLETED)
            systemd.tell("STOPPING=1", "STATUS=finishes the running requests")
            if not refused.done():
                log.info("draining")
            for task in beside:
                task.cancel()
            await dispatchers.drain(settings.drain_seconds)  # meanwhile clients still get states and results
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*tasks)
            refusal = refused.result() if refused.done() and not refused.cancelled() else None
        watching.cancel()
        if is_new and refusal is not None and _is_unused(settings):
            remove_written(settings.data)
        if refusal is not None:
            raise refusal


def _stop_signal(drain_seconds: float) -> asyncio.Event:
    """Returns an event that SIGTERM and SIGINT set. A second SIGINT ends the process, as a crash would."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.stderr.isatty():
            told = f"stopping: the running request is finished, at most {drain_seconds:g} s; Ctrl-C again ends now"
            print(told, file=sys.stderr, flush=True)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stop


async def _refused(service: Service) -> SparseCtrlLcmError:
    """Returns the error in the options of the first endpoint for which no model can be loaded."""
    waits = {asyncio.ensure_future(each.runner.refused()): name for name, each in service.endpoints.items()}
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        first = done.pop()
        return service.settings.of_endpoint(first.result(), waits[first])
    finally:
        for wait in waits:
            wait.cancel()


def _is_unused(settings: Settings) -> bool:
    """Whether a start that was refused, and is over, has left nothing that somebody needs. Blocks."""
    with contextlib.suppress(*STORE_FAILURES), contextlib.closing(SqlStore(settings.database_url)) as store:
        return store.is_unused(owner_name(settings.data))
    return False


async def _once_loaded(service: Service, then: Callable[[Service], None], systemd: Systemd) -> None:
    while not all(endpoint.runner.capacity for endpoint in service.endpoints.values()):
        await asyncio.sleep(LOADED_SECONDS)
    systemd.tell("STATUS=takes requests")
    try:
        await asyncio.to_thread(then, service)
    except Exception:
        log.exception("the first key could not be made; `keys create` makes one")


async def forget_what_is_old(service: Service) -> None:
    """Removes expired files and old requests."""
    settings, now = service.settings, clock.now()
    await asyncio.to_thread(remove_expired_files, service, now)
    await service.board.forget(now - settings.request_seconds, now - settings.private_seconds)


async def _sweep(service: Service) -> None:
    """Removes what is old every `SWEEP_SECONDS`, and what the database no longer needs."""
    while True:
        try:
            await forget_what_is_old(service)
            while await service.store.write(service.store.shrink):
                pass
        except Exception as error:
            if not isinstance(error, STORE_FAILURES):
                log.exception("the sweep failed")
        await asyncio.sleep(SWEEP_SECONDS)
