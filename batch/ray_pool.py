"""Pipelines on a Ray cluster, which make the clips of a batch."""

import os
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..runtime import ClipRequest, VideoPipeline
from ..runtime.errors import BackendError, first_line
from ..runtime.output.writers import complete_file
from ..runtime.request import Keyframe
from ..service.runner.bundle_cache import local_bundle
from ..service.runner.ray_cluster import join_cluster
from .clip_pool import Failed, LocalPool, Made, OnFraction
from .request_lines import Job

RETRIES = 3
"""How often Ray runs a clip again whose process or node died."""


class RemotePipeline:
    """A pipeline in a process of the cluster.

    Args:
        bundle: a folder that every node has, an fsspec URL, or None.
        options: further keywords of `VideoPipeline.load`.
    """

    def __init__(self, bundle: str | None, options: dict[str, Any]) -> None:
        self._pipeline = VideoPipeline.load(local_bundle(bundle), **options)

    def model(self) -> str:
        """Returns `ClipPool.model`."""
        return LocalPool(self._pipeline).model

    def make(self, request: ClipRequest, name: str, fps: float) -> tuple[int, float, bytes]:
        """Returns the seed used, the seconds of a clip, and its file, whose format follows from `name`."""
        clip = self._pipeline.run(request)
        with TemporaryDirectory() as folder:
            file = Path(folder, name)
            clip.save(file, fps)
            return clip.seed, clip.timings["total"], file.read_bytes()


class RayPool:
    """A `ClipPool` of pipelines on a Ray cluster. Ray places them and starts them again.

    Args:
        address: as `join_cluster` takes it.
        replicas: how many pipelines.
        gpus: GPUs of a pipeline; without one it takes as many CPUs as threads.
        bundle, options: as `RemotePipeline` takes them.

    Raises:
        BackendError: Ray is not installed, there is no cluster, or a pipeline cannot load.
    """

    def __init__(self, address: str, replicas: int, gpus: float, bundle: str | None, options: dict[str, Any]) -> None:
        self._ray = ray = join_cluster(address)
        needs = {"num_gpus": gpus, "num_cpus": options["threads"] or 0}
        actor = ray.remote(RemotePipeline).options(**needs, max_restarts=-1, max_task_retries=RETRIES)
        self._pipelines = [actor.remote(bundle, options) for _ in range(replicas)]
        try:
            self.model: str = ray.get(self._pipelines[0].model.remote())
        except ray.exceptions.RayError as error:
            raise BackendError("pool", f"a pipeline could not load: {_last_line(error)}") from None

    def make(self, jobs: Iterable[Job], on_fraction: OnFraction) -> Generator[Made | Failed, None, None]:
        """Yields the outcomes as they come; tells no fractions."""
        ray, left, free, running = self._ray, iter(jobs), deque(self._pipelines), {}
        try:
            while True:
                while free and (job := next(left, None)) is not None:
                    pipeline = free.popleft()
                    task = pipeline.make.remote(_by_value(job.request), job.output.name, job.fps)
                    running[task] = job, pipeline
                if not running:
                    return
                (done,), _ = ray.wait(list(running))
                job, pipeline = running.pop(done)
                free.append(pipeline)
                try:
                    seed, seconds, content = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    yield Failed(job, error.cause)
                except ray.exceptions.RayError as error:
                    yield Failed(job, BackendError("pool", _last_line(error)))
                else:
                    with complete_file(job.output) as part:
                        part.write_bytes(content)
                    yield Made(job, seed, seconds)
        finally:
            for task in running:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(task)


def _by_value(request: ClipRequest) -> ClipRequest:
    """The request with the bytes of its pictures instead of their paths, which other machines do not have."""
    return replace(request, keyframes=[Keyframe(item.index, _content(item.image)) for item in request.keyframes])


def _content(image: Any) -> Any:
    """The bytes of an image file. A path that cannot be read stays: the pipeline has the error for it."""
    if isinstance(image, str | os.PathLike):
        with suppress(OSError):
            return Path(image).read_bytes()
    return image


def _last_line(error: Exception) -> str:
    """The line of Ray's report that says why."""
    lines = str(error).strip().splitlines()
    return lines[-1].rpartition("Error: ")[2] if lines else first_line(error)
