"""Runs requests on a thread of their own for tasks of asyncio."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

from .output.clip import Clip
from .progress import OnFrames, OnPreview, OnProgress, Progress
from .request import ClipRequest

Make = Callable[[ClipRequest, OnProgress | None, OnFrames | None, OnPreview | None], Clip]


class AsyncRuns:
    """One thread that makes the clips of a pipeline in the order in which tasks ask for them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "clips")

    async def run(
        self,
        make: Make,
        request: ClipRequest,
        on_progress: OnProgress | None,
        on_frames: OnFrames | None,
        on_preview: OnPreview | None,
    ) -> Clip:
        """Makes a clip with `make`. A task that is cancelled ends when its run has ended: at the next step."""
        import asyncio  # takes as long as a third of this package, and few callers have tasks

        cancelled = Event()

        def report(progress: Progress) -> Any:
            return not cancelled.is_set() and (on_progress is None or on_progress(progress))

        job = self._thread.submit(make, request, report, on_frames, on_preview)
        ended = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            cancelled.set()
            if not job.cancel():
                await asyncio.wait([ended])
            raise
