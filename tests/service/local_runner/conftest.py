"""A runner whose process loads a stub, and what its tests share."""

import asyncio
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from sparsectrl_lcm.service.runner import LocalRunner

from ..conftest import FAKES


@pytest.fixture(scope="package", autouse=True)
def _stub_is_found() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES), prepend=os.pathsep)
        yield


@pytest.fixture(scope="package")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="package")
def runner(loop: asyncio.Runner, _stub_is_found: None) -> Iterator[LocalRunner]:
    """A shared runner, since it has to stay usable after every test."""
    made = stub_runner(image_pixels=1_000_000)
    loop.run(made.start())
    yield made
    loop.run(made.stop())


def stub_runner(**options: Any) -> LocalRunner:
    return LocalRunner(pipeline="stub_pipeline:load", **options)


def gone(pid: int) -> bool:
    """Whether a process has ended. A zombie has ended too; nobody may reap that of an orphan."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def encoded(size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()
