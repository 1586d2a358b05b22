"""Pipelines on a Ray cluster, which make the clips of a batch."""

import logging
import os
import traceback
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..runtime import ClipRequest, VideoPipeline
from ..runtime.errors import BackendError, DeviceLost, OutputError, SparseCtrlLcmError, first_line
from ..runtime.output.writers import complete_file
from ..runtime.request import Keyframe
from ..runtime.request_warnings import RequestWarning, warnings_to
from ..service.runner.bundle_cache import absolute_bundle, local_bundle
from ..service.runner.ray_cluster import check_gpus, join_cluster, needs_of, reason_in
from .clip_pool import Failed, Made, OnFraction, failed, models_of
from .request_lines import Job

log = logging.getLogger(__name__)

RETRIES = 3
"""How often Ray tries a clip again if its process or node dies."""


@dataclass(frozen=True, slots=True)
class EncodedClip:
    """A clip from the cluster.

    Attributes:
        seed: the seed used.
        seconds: time that its request took.
        content: of its file.
    """

    seed: int
    seconds: float
    content: bytes


class RemotePipeline:
    """A pipeline in a process of the cluster.

    Args:
        bundle: a folder that every node has, an fsspec URL, or None.
        options: further keywords of `VideoPipeline.load`; the bundles of its `weights` are given as `bundle` is.
    """

    def __init__(self, bundle: str | None, options: dict[str, Any]) -> None:
        weights = {name: local_bundle(other) for name, other in options.get("weights", {}).items()}
        self._pipeline = VideoPipeline.load(local_bundle(bundle), **{**options, "weights": weights})

    def models(self) -> dict[str, str]:
        """Returns `ClipPool.models`."""
        return models_of(self._pipeline)

    def make(
        self, request: ClipRequest, name: str, fps: float, metadata: bool
    ) -> tuple[EncodedClip | SparseCtrlLcmError, tuple[RequestWarning, ...]]:
        """Returns a clip, or why there is none, and the warnings of its request.

        The error is returned because Ray hands over either an exception or a value, which would be the warnings.

        Args:
            request: what to make.
            name: of the clip's file; its format follows from it.
            fps, metadata: as for `Clip.save`.
        """
        warnings: list[RequestWarning] = []
        try:
            with warnings_to(warnings.append):
                return self._encoded(request, name, fps, metadata), tuple(warnings)
        except DeviceLost:  # only a new process can use the device again
            traceback.print_exc()
            os._exit(1)
        except SparseCtrlLcmError as error:
            return error, tuple(warnings)
        except Exception as error:  # another library's, which Ray may be unable to copy
            return SparseCtrlLcmError("", first_line(error)), tuple(warnings)

    def _encoded(self, request: ClipRequest, name: str, fps: float, metadata: bool) -> EncodedClip:
        clip = self._pipeline.run(request)
        with TemporaryDirectory() as folder:
            file = Path(folder, name)
            clip.save(file, fps, metadata=metadata)
            return EncodedClip(clip.seed, clip.timings["total"], file.read_bytes())


class RayPipelines:
    """A `ClipPool` of pipelines on a Ray cluster. Ray places them and starts them again.

    A pipeline takes jobs once it has loaded. One for which the cluster has no room yet holds nothing up, and one that
    cannot load is left out, for example because its node lacks the engines.

    Args:
        address: as `join_cluster` takes it.
        replicas: most pipelines.
        gpus: GPUs of a pipeline; without one it takes as many CPUs as threads.
        bundle, options: as `RemotePipeline` takes them.

    Raises:
        InvalidRequest: `gpus` is neither a fraction nor a whole number.
        BackendError: Ray is not installed, there is no cluster, or no pipeline can load.
    """

    def __init__(self, address: str, replicas: int, gpus: float, bundle: str | None, options: dict[str, Any]) -> None:
        check_gpus(gpus)
        self._ray = ray = join_cluster(address)
        needs = needs_of(gpus, options["threads"])
        weights = {name: absolute_bundle(other) for name, other in options.get("weights", {}).items()}
        options = {**options, "weights": weights}
        actor = ray.remote(RemotePipeline).options(**needs, max_restarts=-1, max_task_retries=RETRIES)
        pipelines = [actor.remote(absolute_bundle(bundle), options) for _ in range(replicas)]
        self._loading = {pipeline.models.remote(): pipeline for pipeline in pipelines}
        self._free: deque[Any] = deque()
        self.models: dict[str, str] = {}
        while not self._free:
            (task,), _ = ray.wait(list(self._loading))
            self._end_loading(task)

    def make(self, jobs: Iterable[Job], on_fraction: OnFraction) -> Generator[Made | Failed, None, None]:
        """Yields the outcomes as they come; never calls `on_fraction`.

        Raises:
            BackendError: no pipeline is left, since none could start again.
            OutputError: the disk is full.
        """
        ray, left, running = self._ray, iter(jobs), {}
        try:
            while True:
                while self._free and (job := next(left, None)) is not None:
                    pipeline = self._free.popleft()
                    task = pipeline.make.remote(_by_value(job.request), job.output.name, job.fps, job.metadata)
                    running[task] = job, pipeline
                if self._free and not running:
                    return
                (done,), _ = ray.wait([*running, *self._loading])
                if done in self._loading:
                    self._end_loading(done, in_use=len(running))
                    continue
                job, pipeline = running.pop(done)
                try:
                    made, warnings = ray.get(done)
                except ray.exceptions.RayError as error:
                    if getattr(error, "actor_init_failed", False):  # it was started again, where it cannot load
                        left = chain([job], left)
                        self._leave_out(error, in_use=len(running))
                        continue
                    yield Failed(job, BackendError("pool", reason_in(str(error))))
                else:
                    yield _outcome(job, made, warnings)
                self._free.append(pipeline)
        finally:
            for task in running:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(task)

    def _end_loading(self, task: Any, in_use: int = 0) -> None:
        pipeline = self._loading.pop(task)
        try:
            models = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            self._leave_out(error, in_use)
            return
        self.models = self.models or models
        if models == self.models:
            self._free.append(pipeline)
        else:
            log.warning("a pipeline is left out: its node has another bundle")

    def _leave_out(self, error: Exception, in_use: int) -> None:
        """Raises BackendError if no other pipeline is left; `in_use` of them make clips."""
        reason = reason_in(str(error))
        if not (in_use or self._free or self._loading):
            raise BackendError("pool", f"no pipeline could load: {reason}") from None
        log.warning("a pipeline is left out, since it could not load: %s", reason)


def _outcome(job: Job, made: EncodedClip | SparseCtrlLcmError, warnings: tuple[RequestWarning, ...]) -> Made | Failed:
    """Writes the file of a job that was made."""
    if isinstance(made, SparseCtrlLcmError):
        return Failed(job, made, warnings)
    try:
        with complete_file(job.output) as part:
            part.write_bytes(made.content)
    except OutputError as error:
        return failed(job, error, warnings)
    return Made(job, made.seed, made.seconds, warnings)


def _by_value(request: ClipRequest) -> ClipRequest:
    """The request with the bytes of its pictures instead of their paths, which other machines do not have."""
    return replace(request, keyframes=[Keyframe(item.index, _content(item.image)) for item in request.keyframes])


def _content(image: Any) -> Any:
    """The bytes of an image file. A path that cannot be read stays: the pipeline has the error for it."""
    if isinstance(image, str | os.PathLike):
        with suppress(OSError, ValueError):  # ValueError: no file can have this name
            return Path(image).read_bytes()
    return image
