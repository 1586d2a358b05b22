"""Prepares jobs while their requests still wait: reads the input and fetches the keyframes to this machine's disk."""

import asyncio
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

from ...runtime.images import RESAMPLES
from ..components import Endpoint, Service
from ..network.keyframe_urls import save_keyframe
from ..protocol.errors import ServiceError, field_error
from ..protocol.input_parsing import late_keyframes
from ..protocol.urls import QUEUE_PREFIX
from ..runner import Job, JobFailed
from ..runner.picture_reader import PictureReader
from ..store import STORE_FAILURES
from .retries import until_files_work

OUTSIDE_CONDITIONING = ("seed", "conditioning_scale")
"""Options that change nothing in what the pipeline keeps for the next seed."""
PASS_SECONDS = 0.3
"""A preparation that takes longer is slow: the requests behind it no longer wait for it."""


def keyframe_error(error: JobFailed, slots: tuple[int, ...]) -> ServiceError:
    """Returns the error that the caller gets for a keyframe. `slots` are the keyframes' slots in the input."""
    assert error.keyframe is not None
    return field_error(f"keyframe_{slots[error.keyframe]}_image_url", error.message, "image_load_error")


def check_clip_size(service: Service, endpoint: Endpoint, options: Mapping[str, Any]) -> None:
    """Checks the size that a request asks for against `clip_pixels`. Those of the bundle are always allowed.

    Raises:
        ServiceError: 422: the clip has too many pixels.
    """
    asked = [name for name in ("num_frames", "width", "height") if name in options]
    about, most = endpoint.runner.about, service.settings.clip_pixels
    sides = {"num_frames": about.get("frames", 0), "width": about.get("width", 0), "height": about.get("height", 0)}
    pixels = math.prod(options.get(name, default) for name, default in sides.items())
    if asked and pixels > most:
        message = f"The clip would have {pixels} pixels in all its frames, {most} are allowed"
        raise field_error(asked[0], f"{message}; ask for a smaller size or fewer frames", "value_error")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that is ready to run.

    Attributes:
        job: the job.
        seed: as the caller gave it.
        slots: the slot in the input (0 to 2) of each of the job's keyframes.
    """

    job: Job
    seed: int | None
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preparation:
    """A job that is being prepared. Its holder has to `close` it.

    Attributes:
        key_id: the API key of the request.
        folder: holds the job's files.
        task: prepares the job. Its result is None if the request no longer waits.
        begun_at: when it began, as `time.monotonic`.
    """

    key_id: str
    folder: Path
    task: "asyncio.Task[Prepared | None]"
    begun_at: float

    @property
    def slow(self) -> bool:
        """Whether it is still running and the requests behind it no longer wait for it."""
        return not self.task.done() and time.monotonic() - self.begun_at > PASS_SECONDS

    @property
    def failed(self) -> bool:
        """Whether it has ended without a job."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is not None

    @property
    def inconclusive(self) -> bool:
        """Whether its end decides nothing: the request no longer waits, or the store failed."""
        return isinstance(self.task.exception(), STORE_FAILURES) if self.failed else self.task.result() is None

    async def close(self) -> None:
        """Cancels it and removes its files."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


class Preparations:
    """The preparations of an endpoint's next requests. These are not claimed yet, so they still count as waiting.

    Args:
        service: the service.
        endpoint: the endpoint. Its queue is told whenever a preparation ends.
        pictures: reads the keyframes.
    """

    def __init__(self, service: Service, endpoint: Endpoint, pictures: PictureReader) -> None:
        self._service = service
        self._endpoint = endpoint
        self._pictures = pictures
        self._of_request: dict[str, Preparation] = {}

    def __len__(self) -> int:
        return len(self._of_request)

    def get(self, request_id: str) -> Preparation:
        """Returns the preparation of a request."""
        return self._of_request[request_id]

    def take(self, request_id: str) -> Preparation:
        """Removes the preparation of a request and returns it; the caller has to close it."""
        return self._of_request.pop(request_id)

    def slow(self) -> dict[str, str]:
        """Returns the slow preparations: request id -> API key."""
        return {request_id: item.key_id for request_id, item in self._of_request.items() if item.slow}

    async def keep(self, requests: Mapping[str, str]) -> None:
        """Begins missing preparations and closes those of all other requests, which were cancelled or overtaken.

        Args:
            requests: the next requests: request id -> API key.
        """
        for request_id in self._of_request.keys() - requests.keys():
            await self.take(request_id).close()
        for request_id, key_id in requests.items():
            if request_id not in self._of_request:
                folder = self._service.settings.work / f"job-{token_hex(8)}"
                task = asyncio.create_task(self._prepare(request_id, key_id, folder))
                task.add_done_callback(lambda _: self._endpoint.queue.arrived.set())
                self._of_request[request_id] = Preparation(key_id, folder, task, time.monotonic())

    async def _prepare(self, request_id: str, key_id: str, folder: Path) -> Prepared | None:
        async def prepare() -> Prepared | None:
            try:
                return await _prepare(self._service, self._endpoint, self._pictures, request_id, key_id, folder)
            except OSError:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)  # others may need the room
                raise

        return await until_files_work(prepare, request_id)


async def _prepare(
    service: Service, endpoint: Endpoint, pictures: PictureReader, request_id: str, key_id: str, folder: Path
) -> Prepared | None:
    found = await service.board.input_of(request_id)
    if found is None:
        return None
    given, base_url = found
    if late := late_keyframes(given, endpoint.frames):  # the clips were longer when the request was accepted
        raise ServiceError(422, late)
    options, seed, slots = given.options(), given.seed, tuple(slot for slot, *_ in given.keyframes())
    previews, fps, clip = given.advanced.previews, given.fps, folder / f"clip.{given.output_format}"
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)

    async def save(slot: int, frame: int, url: str) -> tuple[int, Path]:
        path = folder / f"keyframe-{slot}"
        file = await asyncio.to_thread(path.open, "xb")
        try:
            bases = (base_url, base_url + QUEUE_PREFIX)
            await save_keyframe(service, url, file, f"keyframe_{slot}_image_url", bases)
        finally:
            await asyncio.to_thread(file.close)
        return frame, path

    try:
        async with asyncio.TaskGroup() as tasks:
            fetched = [tasks.create_task(save(*keyframe)) for keyframe in given.keyframes()]
            del found, given  # data URIs are large, and the other keyframes may be slow
    except ExceptionGroup as errors:  # the first error cancels the others
        raise errors.exceptions[0] from None
    if fetched:
        about = endpoint.runner.about
        size = (options.get("width", about["width"]), options.get("height", about["height"])) if about else None
        files = [path for _, path in (task.result() for task in fetched)]
        try:
            await pictures.read(key_id, files, size, options.get("resample", RESAMPLES[0]))
        except JobFailed as error:
            raise keyframe_error(error, slots) from None
    keyframes = tuple(task.result() for task in fetched)
    conditioning = await asyncio.to_thread(_conditioning, options, keyframes) if keyframes else _conditioning(options)
    job = Job(request_id, options, keyframes, clip, conditioning, previews, fps)
    return Prepared(job, seed, slots)


def _conditioning(options: dict[str, Any], keyframes: Sequence[tuple[int, Path]] = ()) -> str:
    """Returns `Job.conditioning`: a hash of the options that `cache_key` of the runtime reads, and of the keyframes."""
    digest = sha256(repr(sorted(item for item in options.items() if item[0] not in OUTSIDE_CONDITIONING)).encode())
    for index, path in keyframes:
        digest.update(b"%d:" % index + sha256(path.read_bytes()).digest())
    return digest.hexdigest()
