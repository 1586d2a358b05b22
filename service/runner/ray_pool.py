"""Runners on a Ray cluster. Ray Serve places, restarts and scales them; this is the server's side."""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

from ... import __version__
from ...runtime.errors import BackendError, SparseCtrlLcmError, first_line
from .interface import Job, JobFailed, Made, OnEvent, RunnerLost, RunnerState, RunnerStatus
from .ray_cluster import join_cluster, reason_in
from .ray_deployment import deploy_once, published_about
from .ray_job import RayJob

log = logging.getLogger(__package__)

LOOK_SECONDS, STEADY_SECONDS = 1.0, 5.0
"""How often the state of the replicas is read, and how often while all of them run: it takes 20 ms of a processor."""
ANSWER_SECONDS = 30.0
"""Longest wait for Ray's answer about the replicas; until the next answer none counts as running."""
CLOSE_SECONDS = 5.0
"""Longest wait for the end of a handle's threads."""
OWN_WEIGHTS = "-"
"""Stands for the bundle's weights among the names of others, which begin with a letter or digit."""
_joining = Lock()
"""Held while a process joins the cluster, since the pools of several endpoints may begin to do so."""


class RayPool:
    """A `Runner` whose pipelines are replicas of a Ray Serve application.

    Servers with the same options share one application. It outlives them; `serve shutdown` ends it.

    Args:
        address: as `join_cluster` takes it.
        replicas: fewest and most pipelines. Their number follows that of the requests.
        gpus: GPUs of a replica; a fraction lets several share one. Without one it takes as many CPUs as threads.
        setup: keywords of `ClipReplica`.
        step_seconds: longest silence during a job.
        start_seconds: longest wait for a replica, which may have to be started first.
    """

    def __init__(
        self,
        *,
        address: str,
        replicas: tuple[int, int],
        gpus: float,
        setup: dict[str, Any],
        step_seconds: float,
        start_seconds: float = 900.0,
    ) -> None:
        self._address = address
        self._replicas = replicas
        self._gpus = gpus
        self._setup = setup | {"step_seconds": step_seconds}
        self._silence = step_seconds
        self._longest_wait = start_seconds
        self._handle: Any = None
        self._about: dict[str, Any] = {}
        self._problem: str | None = None
        self._states: dict[str, int] = {}
        self._refused: asyncio.Future[SparseCtrlLcmError] | None = None
        self._jobs: dict[str, RayJob] = {}
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Name of the application: servers of another version, or with other options, have another one."""
        kind = json.dumps([__version__, self._setup, self._replicas, self._gpus], sort_keys=True, default=str)
        return f"sparsectrl-lcm-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"

    async def start(self) -> None:
        """Begins to join the cluster and to deploy, and returns at once."""
        self._refused = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="ray")

    async def stop(self) -> None:
        """Ends all jobs with `RunnerLost("stopped")` and leaves the cluster. The replicas stay."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait({supervisor})
        for running in list(self._jobs.values()):
            running.stream.cancel()
        await self._close_handle()

    async def _close_handle(self) -> None:
        """Ends the threads behind the handle, which would go on sending metrics to a controller that is gone."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await _aside(handle.shutdown)

    @property
    def capacity(self) -> int:
        """See `Runner.capacity`: the most replicas, once one is running. Waiting jobs make Ray start the others."""
        return self._replicas[1] if self._about and self._states.get("RUNNING") else 0

    @property
    def problem(self) -> str | None:
        """See `Runner.problem`."""
        return None if self.capacity else self._problem

    @property
    def about(self) -> dict[str, Any]:
        """See `Runner.about`: what the replica that started last reported."""
        return self._about

    @property
    def runners(self) -> list[RunnerStatus]:
        """See `Runner.runners`: the replicas by rank. Those with a job of this server are busy, the last ones load."""
        running, busy = self._states.get("RUNNING", 0), {job.runner for job in self._jobs.values()}

        def state(rank: int, name: str) -> RunnerState:
            return "loading" if rank >= running else "busy" if name in busy else "ready"

        names = [f"replica-{rank}" for rank in range(sum(self._states.values()))]
        return [RunnerStatus(name, state(rank, name)) for rank, name in enumerate(names)]

    async def refused(self) -> SparseCtrlLcmError:
        """See `Runner.refused`."""
        assert self._refused is not None
        return await asyncio.shield(self._refused)

    async def run(self, job: Job, on_event: OnEvent) -> Made:
        """Makes a clip; see `Runner.run`. It goes to a replica as `_preference` says."""
        if self._handle is None or self._supervisor is None:
            raise RunnerLost("stopped", "the runner was stopped")
        keyframes: list[tuple[int, bytes]] = []
        if job.keyframes:
            keyframes = await asyncio.to_thread(lambda: [(index, path.read_bytes()) for index, path in job.keyframes])
        handle = self._handle.options(stream=True, **self._preference(job))
        file = (job.output.name, job.fps, job.place)
        stream = handle.make.remote(job.options, keyframes, job.previews, *file)
        running = self._jobs[job.id] = RayJob(job, on_event, stream)
        try:
            return await running.follow(self._longest_wait, self._silence)
        except (JobFailed, RunnerLost):
            raise
        except asyncio.CancelledError:
            if (ended := self._ended(running)) is None:
                raise
            raise ended from None
        except Exception as error:  # Ray's, of many classes
            lost = running.lost("crashed", f"was lost: {first_line(error)}")
            raise self._ended(running) or lost from None
        finally:
            with suppress(Exception):
                stream.cancel()
            del self._jobs[job.id]

    def _preference(self, job: Job) -> dict[str, str]:
        """Returns what `FreeReplicaRouter` prefers a replica for, as options of a handle.

        If there are several weights, it is the name of the job's, since a refit takes longest. Otherwise it is the
        job's conditioning.
        """
        if self._setup["options"].get("weights"):
            return {"multiplexed_model_id": job.weights or OWN_WEIGHTS}
        return {"session_id": job.conditioning}

    def _ended(self, running: RayJob) -> JobFailed | RunnerLost | None:
        """Returns what ended a job on purpose, if anything did."""
        if running.cancelled:
            return JobFailed("cancelled", "cancelled")
        return RunnerLost("stopped", "the runner was stopped") if self._supervisor is None else None

    def cancel(self, job_id: str) -> None:
        """Ends a job; see `Runner.cancel`."""
        if (running := self._jobs.get(job_id)) is not None:
            running.cancelled = True
            running.stream.cancel()

    async def _supervise(self) -> None:
        """Joins the cluster, deploys, and keeps the state of the replicas up to date."""
        while True:
            try:
                if self._handle is None:
                    self._handle = await _aside(self._deploy)
                await self._look()
            except SparseCtrlLcmError as error:
                self._refuse(error)
                return
            except Exception as error:
                problem = f"Ray does not answer: {first_line(error)}"
                if problem != self._problem:
                    log.warning("%s", problem)
                self._problem, self._states = problem, {}
            await asyncio.sleep(STEADY_SECONDS if self._steady else LOOK_SECONDS)

    @property
    def _steady(self) -> bool:
        return self.capacity > 0 and self._states.keys() == {"RUNNING"} and self._handle is not None

    def _refuse(self, error: SparseCtrlLcmError) -> None:
        self._problem = str(error)
        assert self._refused is not None
        if not self._refused.done():
            self._refused.set_result(error)

    def _deploy(self) -> Any:
        """Returns the handle of the application, which is deployed unless another server did. Blocks."""
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        with _joining:
            ray = join_cluster(self._address)
            from ray import serve

            serve.start(proxy_location="Disabled")
        if self.name not in serve.status().applications:
            deploy_once(ray, self.name, self._replicas, self._gpus, self._setup)
        return serve.get_app_handle(self.name)

    async def _look(self) -> None:
        """Reads the states of the replicas and, while one is running, what the one that started last runs."""
        async with asyncio.timeout(ANSWER_SECONDS):
            status = await _aside(self._status)
        if status is None:
            log.warning("the replicas were shut down; they are deployed again")
            self._states = {}
            await self._close_handle()
            return
        deployment = next(iter(status.deployments.values()), None)
        self._states = {str(state): count for state, count in deployment.replica_states.items()} if deployment else {}
        if self._states.get("RUNNING"):
            async with asyncio.timeout(ANSWER_SECONDS):
                about = await _aside(lambda: published_about(self.name))
            if about and not self._about:
                log.info("the runner is ready", extra=about)
            self._about = about or self._about
        failed = status.status == "DEPLOY_FAILED"
        if deployment and (reason := reason_in(deployment.message)):
            self._problem = reason
        if failed and not self._about:
            raise BackendError("pool", f"no replica could load: {self._problem}")

    def _status(self) -> Any:
        from ray import serve

        return serve.status().applications.get(self.name)


async def _aside(function: Callable[[], Any]) -> Any:
    """Calls a function of Ray's in a thread that no shutdown waits for: it may block while the cluster is silent."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: Exception | None) -> None:
        if not result.done():
            result.set_exception(error) if error else result.set_result(value)

    def call() -> None:
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, error)

    Thread(target=call, name="ray", daemon=True).start()
    return await result
