"""Jobs made ready while their requests still wait: input read, keyframes on this machine's disk."""

import asyncio
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from sqlalchemy.exc import SQLAlchemyError

from .context import QUEUE_PREFIX, Service
from .keyframes import save_keyframe
from .runner import Job
from .schema import parse_input

PASS_SECONDS = 0.3
"""How long requests wait for the preparation of one that came first."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that can be run.

    Attributes:
        seed: as the caller gave it.
        slots: the input's slot of each of the job's keyframes.
    """

    job: Job
    seed: int | None
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preparation:
    """A job on its way; None as the result where the request waits no longer. `close` ends it in any case."""

    key_id: str
    folder: Path
    task: "asyncio.Task[Prepared | None]"
    begun_at: float

    @property
    def slow(self) -> bool:
        """Whether it is under way, and the requests behind it should not wait for it any longer."""
        return not self.task.done() and time.monotonic() - self.begun_at > PASS_SECONDS

    @property
    def failed(self) -> bool:
        """Whether it has ended without a job."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is not None

    @property
    def vain(self) -> bool:
        """Whether its end says nothing of the request: this waits no longer, or the store failed."""
        return isinstance(self.task.exception(), SQLAlchemyError) if self.failed else self.task.result() is None

    async def close(self) -> None:
        """Ends it; its files are gone then."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


class Preparations:
    """Jobs of the requests that come next. Nobody has claimed these: they still count as waiting.

    Args:
        service: of the server.
        told: set whenever a preparation ends.
    """

    def __init__(self, service: Service, told: asyncio.Event) -> None:
        self._service = service
        self._told = told
        self._there: dict[str, Preparation] = {}

    @property
    def there(self) -> bool:
        """Whether there is any."""
        return bool(self._there)

    def get(self, request_id: str) -> Preparation:
        """The preparation of a request that is kept."""
        return self._there[request_id]

    def take(self, request_id: str) -> Preparation:
        """The preparation of a request, which is the caller's from now on."""
        return self._there.pop(request_id)

    def slow(self) -> dict[str, str]:
        """The API keys of those that are slow, by the requests' ids."""
        return {request_id: item.key_id for request_id, item in self._there.items() if item.slow}

    async def keep(self, requests: Mapping[str, str]) -> None:
        """Begins those that are missing, and ends all others: their requests were cancelled, or others came first.

        Args:
            requests: the API keys of those that come next, by their ids.
        """
        for request_id in self._there.keys() - requests.keys():
            await self.take(request_id).close()
        for request_id, key_id in requests.items():
            if request_id not in self._there:
                folder = self._service.settings.work / f"job-{token_hex(8)}"
                task = asyncio.create_task(_prepare(self._service, request_id, folder))
                task.add_done_callback(lambda _: self._told.set())
                self._there[request_id] = Preparation(key_id, folder, task, time.monotonic())


async def _prepare(service: Service, request_id: str, folder: Path) -> Prepared | None:
    found = await service.board.call(service.store.given, request_id)
    if found is None:
        return None
    values, base_url = found
    given = parse_input(values, service.settings.prompt_characters)
    options, seed, slots = given.options(), given.seed, tuple(slot for slot, *_ in given.keyframes())
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)

    async def one(slot: int, frame: int, url: str) -> tuple[int, Path]:
        path = folder / f"keyframe-{slot}"
        with path.open("xb") as file:
            bases = (base_url, base_url + QUEUE_PREFIX)
            await save_keyframe(service, url, file, f"keyframe_{slot}_image_url", bases)
        return frame, path

    try:
        async with asyncio.TaskGroup() as tasks:
            fetched = [tasks.create_task(one(*keyframe)) for keyframe in given.keyframes()]
            del found, values, given  # data URIs are large, and the other keyframes may be slow
    except ExceptionGroup as errors:  # of one keyframe; the others are not waited for
        raise errors.exceptions[0] from None
    job = Job(request_id, options, tuple(task.result() for task in fetched), folder / "clip.mp4")
    return Prepared(job, seed, slots)
