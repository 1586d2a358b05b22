"""Takes the waiting requests of an endpoint, hands them to its runner, stores their clips, and ends them."""

import asyncio
import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import clock
from ..components import Endpoint, Service
from ..objects.object_stores import on_every_machine
from ..objects.stored_files import announced_clip, file_url, store_clip
from ..protocol.clip_input import INPUT_FIELDS
from ..protocol.errors import ServiceError, failed, field_error, infrastructure_error, model_error
from ..runner import Encoding, Event, Job, JobFailed, Made, OnEvent, Preview, RunnerLost
from ..runner.picture_reader import PictureReader
from ..store import STORE_FAILURES, FileRow, Outcome
from .job_preparation import Preparation, Preparations, Prepared, check_clip_size, keyframe_error
from .next_requests import NextRequests
from .retries import until_files_work, until_it_is_stored
from .views import View

AHEAD = 2
"""How many requests are prepared before their turn, besides one for each runner. Slow ones let the next ones pass."""
SLOW, SLOW_OF_KEY = 24, 6
"""Most slow preparations that run in addition: in total, and of one API key, whose next requests wait for these."""
STORED_AT_ONCE = 2
"""Most requests of a runner that are claimed besides the one that it makes: their clips are encoded and stored."""
IDLE_SECONDS = 1.0
"""How soon the dispatcher looks for requests that nobody has told it of."""
READY_SECONDS = 0.1
"""How soon the dispatcher notices that a runner is ready or a preparation is slow."""

log = logging.getLogger("sparsectrl_lcm.service")


class Dispatcher:
    """Claims an endpoint's waiting requests in order, as soon as a runner is free, and ends each of them.

    Args:
        service: the service.
        endpoint: the endpoint.
        pictures: reads the keyframes.
    """

    def __init__(self, service: Service, endpoint: Endpoint, pictures: PictureReader) -> None:
        self.service = service
        self._board = service.board
        self._endpoint = endpoint
        self._runner = endpoint.runner
        self._next = NextRequests(service.store, endpoint.queue)
        self._preparations = Preparations(service, endpoint, pictures)
        self._at_runners: set[str] = set()
        self._claimer: asyncio.Task[None] | None = None
        self._claimed: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins to claim."""
        self._claimer = asyncio.create_task(self._claim_all(), name="dispatcher")

    async def drain(self, end: float) -> None:
        """Begins nothing more, and waits for what runs until `end`, as `time.monotonic`. May be repeated.

        The service is `draining` already.
        """
        self._endpoint.queue.arrived.set()
        if self._claimer is not None:
            await asyncio.wait({self._claimer}, timeout=max(0.0, end - time.monotonic()))
        if self._claimed:
            await asyncio.wait(self._claimed, timeout=max(0.0, end - time.monotonic()))
        tasks = [task for task in (self._claimer, *self._claimed) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._claimer = None
        await self._preparations.keep({})

    async def _claim_all(self) -> None:
        arrived = self._endpoint.queue.arrived
        while not self.service.draining:
            arrived.clear()
            try:
                if await self._begin_next():
                    continue
            except Exception as error:
                self._next.forget()
                if not isinstance(error, STORE_FAILURES):
                    log.exception("no request could be begun")
                await asyncio.sleep(IDLE_SECONDS)
                continue
            soon = len(self._preparations) and len(self._at_runners) < max(1, self._runner.capacity)
            with suppress(TimeoutError):
                async with asyncio.timeout(READY_SECONDS if soon else IDLE_SECONDS):
                    await arrived.wait()

    async def _begin_next(self) -> bool:
        """Begins the first request that is ready; returns False if there is none."""
        if self.service.owner_lock.problem is not None:
            await self._preparations.keep({})
            return False
        slow = self._preparations.slow()
        busy = [key_id for key_id, count in Counter(slow.values()).items() if count >= SLOW_OF_KEY]
        limit = AHEAD + max(1, self._runner.capacity) + min(SLOW, len(slow))
        ahead = await self._next.first(limit, slow, busy)
        await self._preparations.keep(ahead)
        for request_id in ahead:
            preparation = self._preparations.get(request_id)
            if not preparation.task.done():
                if preparation.slow:
                    continue
                return False
            if not (preparation.failed or self._free):
                continue
            view = await self._claim(request_id, preparation)
            if view is None:
                continue
            if not preparation.failed:
                self._at_runners.add(view.row.id)
            task = asyncio.create_task(self._run(view, preparation), name=request_id)
            self._claimed.add(task)
            task.add_done_callback(self._claimed.discard)
            return True
        return False

    async def _claim(self, request_id: str, preparation: Preparation) -> View | None:
        """Claims a request. Returns None if it was cancelled, has expired, or was claimed by another server."""
        view = None
        if not preparation.inconclusive:
            prepared = None if preparation.failed else preparation.task.result()
            ending = None if prepared is None else prepared.job.output.suffix
            clip = None if ending is None else announced_clip(preparation.key_id, ending)
            view = await self._board.claim(request_id, self.service.settings.lease_seconds, clip)
        self._preparations.take(request_id)
        if view is None:
            self._next.forget()
            await preparation.close()
        self._next.drop(request_id)
        return view

    @property
    def _free(self) -> bool:
        capacity = self._runner.capacity
        return len(self._at_runners) < capacity and len(self._claimed) < capacity * (1 + STORED_AT_ONCE)

    async def _run(self, view: View, preparation: Preparation) -> None:
        row, start = view.row, time.monotonic()
        metrics, endpoint = self.service.metrics, self._endpoint.name
        metrics.wait.labels(endpoint).observe(max(0.0, clock.now() - row.created_at))
        try:
            outcome = await self._attempt(view, preparation)
            if isinstance(outcome, RunnerLost):
                await self._board.put_back(view, crashed=outcome.kind != "stopped")
            elif (status := await self._board.finish(view, outcome)) is not None:
                seconds = time.monotonic() - start
                metrics.total.labels(endpoint).observe(seconds)
                about = {"request_id": row.id, "status": status, "seconds": round(seconds, 3)}
                log.info("request ended", extra=about)
        except Exception:
            log.exception("the end of a request was not written", extra={"request_id": row.id})
        finally:
            self._board.abandon(view)
            self._leave_runner(view)
            await preparation.close()

    def _leave_runner(self, view: View) -> None:
        if view.row.id in self._at_runners:
            self._at_runners.remove(view.row.id)
            self._endpoint.queue.arrived.set()

    async def _attempt(self, view: View, preparation: Preparation) -> Outcome | RunnerLost:
        """Makes one attempt. Returns the outcome, or how it lost its runner if the request should be tried again."""
        slots: tuple[int, ...] = ()
        try:
            prepared = await preparation.task
            assert prepared is not None
            slots = prepared.slots
            return await self._make(view, prepared)
        except ServiceError as error:
            return failed(error)
        except JobFailed as error:
            return failed(_job_error(error, slots))
        except RunnerLost as error:
            return self._lost(view, error)
        except Exception:
            log.exception("a request failed", extra={"request_id": view.row.id})
            return failed(infrastructure_error("internal_error", "Internal Server Error"))

    def _lost(self, view: View, error: RunnerLost) -> Outcome | RunnerLost:
        about = {"request_id": view.row.id} | ({"runner": error.runner} if error.runner else {})
        if error.kind == "stopped":
            log.warning("a request waits again: %s", error.message, extra=about)
            self._board.log(view, f"The request waits again: {error.message}")
            return error
        self.service.metrics.lost.labels(self._endpoint.name, error.runner, error.kind).inc()
        log.error("the runner was lost: %s", error.message, extra=about)
        self._board.log(view, f"The runner was lost: {error.message}", "ERROR")
        if view.row.retry and view.row.crashes < self.service.settings.retries:
            return error
        if error.kind == "hung":
            return failed(model_error(504, "generation_timeout", "The clip took too long"))
        return failed(infrastructure_error("runner_server_error", "The runner died while it made the clip"))

    async def _make(self, view: View, prepared: Prepared) -> Outcome:
        clip = view.clip
        assert clip is not None
        check_clip_size(self.service, self._endpoint, prepared.job.options)
        files_url = self.service.settings.files_url
        place = None
        if on_every_machine(files_url):
            place = (files_url, clip.object_name)
            view.clip = None  # a runner that is lost or cancelled may have written the object: its record stays
        made = await self._run_job(view, replace(prepared.job, place=place, retry=view.row.retry))
        view.clip = clip if made.stored is None else replace(clip, size=made.stored)
        metrics, endpoint = self.service.metrics, self._endpoint.name
        for stage, seconds in made.timings.items():
            metrics.stages.labels(endpoint, stage).observe(seconds)
        if made.stored is None:
            await self._keep_clip(view, prepared.job.output)
        seed = made.seed if prepared.seed is None else prepared.seed
        metrics.clips.labels(endpoint, made.runner).inc()
        self._board.log(view, _summary(made), "INFO", {"fraction": "1"})
        file = view.clip
        video: dict[str, Any] = {"url": file_url(view.row.base_url, file), "content_type": file.content_type}
        video |= {"file_name": file.name, "file_size": file.size}
        return Outcome(200, {"video": video, "seed": seed}, seconds=round(made.seconds, 4), frames=made.frames)

    async def _run_job(self, view: View, job: Job) -> Made:
        """Runs a job. Repeats it while the disk is full, unless it is cancelled; others may use the runner."""

        async def run() -> Made:
            if view.cancelled:
                raise JobFailed("cancelled", "cancelled")
            try:
                return await self._runner.run(job, self._listener(view))
            finally:
                self._leave_runner(view)

        return await until_files_work(run, job.id)

    def _listener(self, view: View) -> OnEvent:
        def listen(event: Event) -> None:
            if isinstance(event, Encoding):
                self._leave_runner(view)
            elif isinstance(event, Preview):
                self._board.show(view, event.jpeg)
            elif event.step:
                labels = {"stage": event.stage, "fraction": f"{event.fraction:.3f}"}
                self._board.log(view, f"{event.stage} {event.step}/{event.steps}", "INFO", labels)

        return listen

    async def _keep_clip(self, view: View, clip: Path) -> None:
        """Stores a clip. Retries while the object store fails or is full, unless the request is cancelled."""
        announced = view.clip
        assert announced is not None

        async def store() -> FileRow:
            if view.cancelled:
                view.clip = None  # an attempt that failed may have written the object: its record stays
                raise JobFailed("cancelled", "cancelled")
            return await asyncio.to_thread(store_clip, self.service, announced, clip)

        with self.service.metrics.unstored.track_inprogress():
            view.clip = await until_it_is_stored(store, clip, view.row.id)


def _job_error(error: JobFailed, slots: tuple[int, ...]) -> ServiceError:
    """Returns the error that the caller gets for a failed job. `slots` are its keyframes' slots in the input."""
    if error.kind == "cancelled":
        return infrastructure_error("client_cancelled", "Request was cancelled")
    if error.kind == "out_of_memory":
        return model_error(500, "internal_server_error", "The clip does not fit into memory")
    if error.kind == "failed":
        what = "The weights could not be loaded" if error.field == "weights" else "The clip could not be made"
        return model_error(500, "internal_server_error", what)
    if error.keyframe is not None:
        return keyframe_error(error, slots)
    if error.field is None:
        return field_error("prompt", error.message, "value_error")
    field = INPUT_FIELDS.get(error.field, error.field)
    return field_error(field, f"{field}: {error.message}", "value_error")


def _summary(made: Made) -> str:
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in made.timings.items() if stage != "total")
    return f"made in {made.seconds:.2f} s ({stages})"
