"""A runner on a Ray cluster: the class whose replicas Ray Serve places, restarts and scales."""

import asyncio
import logging
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray import serve
from ray.util import get_node_ip_address

from ...runtime.errors import DeviceLost, first_line
from ..objects.object_stores import open_files
from .clip_jobs import ClipOrder, Jobs, about
from .process_main import load
from .ray_deployment import publish_about

GATHER_SECONDS = 0.25
"""Messages that come within this time travel together; the last one of a job does not wait. Each part costs the server
and the replica milliseconds of processor time."""
LAST = ("made", "failed")

log = logging.getLogger(__package__)


class _Channel:
    """What one job says, and whether it was cancelled. The job runs in a thread, its reader in the event loop.

    Args:
        clip: the local file of the clip.
        place: URL of an object store and name of the object that the clip becomes; None sends it by value.
    """

    def __init__(self, clip: Path, place: tuple[str, str] | None) -> None:
        self.cancelled = threading.Event()
        self.spoke_at = time.monotonic()
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._clip = clip
        self._place = place
        self._loop = asyncio.get_running_loop()

    def say(self, what: str, **values: Any) -> None:
        if what == "encoding":
            return
        if what == "made" and not self.cancelled.is_set():
            values |= self._deliver()
        self.spoke_at = time.monotonic()
        self._loop.call_soon_threadsafe(self._messages.put_nowait, {"say": what, **values})

    def _deliver(self) -> dict[str, Any]:
        """Writes the clip to the object store and returns its size; if this node cannot, returns the clip."""
        if self._place is not None:
            url, name = self._place
            try:
                return {"stored": open_files(url).put(name, self._clip)}
            except Exception as error:  # of the store's own library
                log.warning("the server stores a clip, since this node cannot: %s", first_line(error))
        return {"clip": self._clip.read_bytes()}

    async def parts(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yields the messages, several at a time, until the job has ended."""
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1]["say"] not in LAST:
            messages = [await self._messages.get()]
            with suppress(TimeoutError):
                async with asyncio.timeout(GATHER_SECONDS):
                    while messages[-1]["say"] not in LAST:
                        messages.append(await self._messages.get())
            yield messages


class ClipReplica:
    """One pipeline. Takes one job at a time and streams the messages that `process_main.py` describes.

    Publishes what it runs once it has loaded.

    Args:
        pipeline: `module:callable` that creates the pipeline; gets `options` as keywords.
        options: as `LocalRunner` passes them. Paths are those of every node.
        image_pixels: pixels of the largest keyframe.
        step_seconds: longest silence during a job; after that Ray replaces the replica.
    """

    def __init__(self, pipeline: str, options: dict[str, Any], image_pixels: int, step_seconds: float) -> None:
        self._pipeline = load(pipeline, options)
        self._jobs = Jobs(self._pipeline, image_pixels)
        self._step_seconds = step_seconds
        self._thread = ThreadPoolExecutor(1, "pipeline")
        self._job: _Channel | None = None
        publish_about(serve.get_replica_context().app_name, about(self._pipeline))

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica if this raises."""
        if self._job is not None and time.monotonic() - self._job.spoke_at > self._step_seconds:
            raise TimeoutError(f"the pipeline said nothing for {self._step_seconds:g} s")

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
    async def keep(self, weights: str) -> str:
        """Tells Ray Serve which weights this replica has, so that it gets the next job with them."""
        return weights

    async def make(
        self,
        options: dict[str, Any],
        keyframes: list[tuple[int, bytes]],
        previews: bool,
        name: str,
        fps: float,
        place: tuple[str, str] | None,
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Makes a clip. Yields `begun`, then the job's messages, several at a time.

        `begun` has the name of this replica as `runner`, with its rank as its number, and the address of its `node`.
        `made` has the size of the clip if it is `stored` at `place`, as `_Channel` takes it; otherwise the `clip`.
        If the stream is cancelled, the job ends at its next step.
        """
        if weights := serve.get_multiplexed_model_id():  # only if there are several
            await self.keep(weights)
        with TemporaryDirectory() as folder:
            files = [(index, str(Path(folder, f"keyframe-{number}"))) for number, (index, _) in enumerate(keyframes)]
            for (_, file), (_, content) in zip(files, keyframes, strict=True):
                Path(file).write_bytes(content)
            clip = Path(folder, name)
            job = self._job = _Channel(clip, place)
            rank = serve.get_replica_context().rank.rank
            job.say("begun", runner=f"replica-{rank}", node=get_node_ip_address())
            order = ClipOrder(options, files, str(clip), previews, fps)
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._make, job, order)
            try:
                async for messages in job.parts():
                    yield messages
            finally:
                job.cancelled.set()
                await asyncio.shield(work)  # the next job begins once this one has left the pipeline
                self._job = None

    def _make(self, job: _Channel, order: ClipOrder) -> None:
        try:
            self._jobs.make(job, order)
            self._jobs.finish()
        except DeviceLost:  # only a new process can use the device again
            traceback.print_exc()
            os._exit(1)
