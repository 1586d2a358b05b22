"""A real loopback server with the routes of files and uploads, and a service without a runner."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sparsectrl_lcm.service.auth.api_keys import Keyring, create_key
from sparsectrl_lcm.service.http.body_slots import BodySlots
from sparsectrl_lcm.service.objects.object_stores import Files, open_files
from sparsectrl_lcm.service.protocol.errors import ServiceError
from sparsectrl_lcm.service.routes import files, uploads
from sparsectrl_lcm.service.settings import Settings
from sparsectrl_lcm.service.store import SqlStore


class StorageService:
    """The parts of the service that the routes need."""

    def __init__(self, data: Path, **settings: object) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.settings = Settings(data=data, **settings)
        self.store = SqlStore(self.settings.database_url)
        self.files: Files = open_files(self.settings.files_url)
        self.secret = b"s" * 32
        self.bodies = BodySlots(self.settings.uploads, self.settings.key_uploads, self.settings.body_seconds)
        self.keyring = Keyring(self.store, seconds=0)

    def new_key(self) -> str:
        return create_key(self.store, "test")

    def base_url(self, request: Request) -> str:
        return str(request.base_url).rstrip("/")

    def temporary(self) -> list[Path]:
        folder = self.settings.data / "tmp"
        return list(folder.iterdir()) if folder.is_dir() else []


async def render(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return JSONResponse(error.body, error.status, error.headers)


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serves an app on a free loopback port; yields its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def storage_app() -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    app.include_router(files.router)
    app.include_router(uploads.router)
    app.add_exception_handler(ServiceError, render)
    return app
