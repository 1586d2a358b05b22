"""What blocks, such as calls of the file system, runs in threads and not on the event loop."""

import asyncio
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sparsectrl_lcm.service.app import create_app
from sparsectrl_lcm.service.queue import submission
from sparsectrl_lcm.service.server import open_service, running
from sparsectrl_lcm.service.settings import Settings

from .conftest import APP
from .stand_in import StandIn, until


def test_the_disk_is_left_to_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = threading.get_ident()
    calls: set[tuple[str, bool]] = set()
    needed = {"statvfs", "unlink", "mkdir", "open"}

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not isinstance(arguments[0], int):  # of a pipe
                calls.add((name, threading.get_ident() == loop))
            return function(*arguments, **keywords)

        return call

    async def scenario() -> None:
        async with running(service), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for module, name in ((os, "statvfs"), (os, "unlink"), (os, "mkdir"), (io, "open")):
                monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
            picture = {"keyframe_0_image_url": "data:image/png;base64,AA=="}
            for kept in (True, False):  # in memory, and on disk
                monkeypatch.setattr(submission, "_is_small", lambda _, kept=kept: kept)
                assert (await client.post(f"/queue/{APP}", json={"prompt": "a", **picture})).status_code == 200
            assert (await client.post("/files/upload", content=b"1" * 3_000_000)).status_code == 200
            await until(lambda: {name for name, _ in calls.copy()} >= needed)
            await asyncio.sleep(0.3)
            monkeypatch.undo()

    service = open_service(Settings(tmp_path, anonymous=True), StandIn())
    transport = httpx.ASGITransport(create_app(service))
    asyncio.run(scenario())
    assert {name for name, _ in calls} >= needed
    assert [name for name, on_loop in calls if on_loop] == []
