"""Who makes the clips of a batch: the interface, and a pool of one pipeline in this process."""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from ..runtime import ClipRequest, Progress, VideoPipeline
from ..runtime.disk_errors import is_disk_full
from ..runtime.request_warnings import RequestWarning
from .request_lines import Job

OnFraction = Callable[[Job, float], None]
"""Called with a job that runs and the fraction of it that is done, on any thread."""


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A clip, which is at `Job.output`.

    Attributes:
        job: the job.
        seed: the seed used.
        seconds: time that its request took.
        warnings: of its request.
    """

    job: Job
    seed: int
    seconds: float
    warnings: tuple[RequestWarning, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Failed:
    """A job that ended without a clip."""

    job: Job
    error: Exception
    warnings: tuple[RequestWarning, ...] = ()


def failed(job: Job, error: Exception, warnings: tuple[RequestWarning, ...] = ()) -> Failed:
    """Returns the outcome of a job that raised an error. That of a full disk ends the batch: it is raised again."""
    if is_disk_full(error):
        raise error
    return Failed(job, error, warnings)


class ClipPool(Protocol):
    """Makes clips, in one process or in many.

    Attributes:
        models: checksums of the model by the weights that a request names, "" for none; clips of another model are not
            the same.
    """

    models: dict[str, str]

    def make(self, jobs: Iterable[Job], on_fraction: OnFraction) -> Generator[Made | Failed, None, None]:
        """Yields the outcome of each job, in any order. Takes few jobs ahead; closing the iterator ends the work.

        The file at `Job.output` appears whole, before its outcome. A file that cannot be written fails its job alone.

        Raises:
            OutputError: the disk is full.
        """


def models_of(pipeline: VideoPipeline) -> dict[str, str]:
    """Returns `ClipPool.models` of a pipeline."""
    own = pipeline.bundle.manifest.checksum
    return {"": own} | {name: f"{own} {other.manifest.checksum}" for name, other in pipeline.weights.items()}


class LocalPool:
    """One pipeline in this process. A clip is encoded while the next one is made."""

    def __init__(self, pipeline: VideoPipeline) -> None:
        self._pipeline = pipeline
        self.models = models_of(pipeline)

    def make(self, jobs: Iterable[Job], on_fraction: OnFraction) -> Generator[Made | Failed, None, None]:
        """Yields the outcomes in the order of the jobs.

        Raises:
            DeviceLost: the device is gone.
            OutputError: the disk is full.
        """
        taken: dict[int, Job] = {}
        warned: defaultdict[int, list[RequestWarning]] = defaultdict(list)

        def requests() -> Iterator[ClipRequest]:
            for position, job in enumerate(jobs):
                taken[position] = job
                yield job.request

        def on_progress(position: int, progress: Progress) -> None:
            on_fraction(taken[position], progress.fraction)

        def on_warning(position: int, warning: RequestWarning) -> None:
            warned[position].append(warning)

        with closing(self._pipeline.generate_many(requests(), on_progress, on_warning)) as results:
            for position, result in enumerate(results):
                job, warnings = taken.pop(position), tuple(warned.pop(position, ()))
                try:
                    clip = result.get()
                    clip.save(job.output, job.fps, metadata=job.metadata)
                except Exception as error:
                    yield failed(job, error, warnings)
                else:
                    yield Made(job, clip.seed, clip.timings["total"], warnings)
