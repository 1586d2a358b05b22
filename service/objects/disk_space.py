"""Free space on the disk of the data folder: checked before work is accepted. A full disk becomes a 507."""

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from ...runtime.disk_errors import is_disk_full
from ..components import Service
from ..protocol.errors import ServiceError


async def check_free_space(service: Service) -> None:
    """Refuses new work while space is short, since the work already accepted needs the rest.

    Raises:
        ServiceError: 507 if less than `Settings.free_bytes` are free, on the disk and in SQLite's file together.
    """
    disk = await asyncio.to_thread(shutil.disk_usage, service.settings.data)
    short = service.settings.free_bytes - disk.free
    if short > 0 and await service.store.read(service.store.unused_bytes) < short:
        raise _disk_full()


@contextmanager
def disk_full_is_507() -> Iterator[None]:
    """Turns the system's error for a full disk into ServiceError 507."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise _disk_full() from error


def _disk_full() -> ServiceError:
    return ServiceError(507, "The server has no space left for files", "internal_error")
