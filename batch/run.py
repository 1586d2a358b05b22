"""Runs a batch: skips the clips that are there, has the others made, and writes a result for each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..runtime.errors import SparseCtrlLcmError, first_line, message
from ..runtime.output.writers import check_output
from ..runtime.request_warnings import RequestWarning
from .clip_pool import ClipPool, Made, OnFraction
from .line_errors import FIELDS
from .request_lines import Job, WrongLine
from .results_file import ResultsFile, checksum


@dataclass(slots=True)
class Tally:
    """The clips of a batch so far.

    Attributes:
        made: made now.
        kept: made before.
        failed: a sentence for each error.
    """

    made: int = 0
    kept: int = 0
    failed: list[str] = field(default_factory=list)


def run_batch(
    jobs: Iterable[Job | WrongLine],
    results: ResultsFile,
    pool: ClipPool,
    on_fraction: OnFraction = lambda *_: None,
    on_end: Callable[[Job], None] = lambda _: None,
    on_kept: Callable[[Job], None] = lambda _: None,
    on_warning: Callable[[int, Sequence[RequestWarning]], None] = lambda *_: None,
) -> Tally:
    """Makes all clips that `results` does not have. A job that fails does not stop the others.

    Args:
        jobs: taken one by one.
        results: receives a line for each clip and error.
        pool: makes the clips.
        on_fraction: called with a job that runs and the fraction of it that is done, on any thread.
        on_end: called with each job that has ended.
        on_kept: called with each job whose clip is there.
        on_warning: called with the line of each job that was made or failed, and its warnings.

    Raises:
        DeviceLost: the device is gone. The results so far are written.
        OSError: the disk is full.
    """
    tally = Tally()
    digests: dict[str, str] = {}

    def fail(line: int, job_id: str, error: SparseCtrlLcmError) -> None:
        told = {"field": error.field, "reason": error.reason, "remedy": error.remedy}
        results.add({"line": line, "id": job_id, "status": "error", "error": told})
        tally.failed.append(f"line {line}: {message(**told)}")

    def pending() -> Iterator[Job]:
        for job in jobs:
            if isinstance(job, WrongLine):
                fail(job.line, job.id, job.error)
                continue
            digest = job.digest(pool.models)
            if results.has(job.id, digest):
                tally.kept += 1
                on_kept(job)
                continue
            try:
                check_output(job.output, job.fps)
            except SparseCtrlLcmError as error:
                fail(job.line, job.id, _of_line(error))
                on_end(job)
                continue
            digests[job.id] = digest
            yield job

    with closing(pool.make(pending(), on_fraction)) as outcomes:
        for outcome in outcomes:
            job = outcome.job
            on_warning(job.line, outcome.warnings)
            if isinstance(outcome, Made):
                results.add(_done(outcome, digests.pop(job.id)))
                tally.made += 1
            else:
                fail(job.line, job.id, _of_line(outcome.error))
            on_end(job)
    return tally


def _of_line(error: Exception) -> SparseCtrlLcmError:
    """Renames the field of a pipeline's error to the name that it has in a line."""
    if not isinstance(error, SparseCtrlLcmError):
        return SparseCtrlLcmError("", first_line(error))
    return SparseCtrlLcmError(FIELDS.get(error.field, error.field), error.reason, error.remedy)


def _done(made: Made, digest: str) -> dict[str, Any]:
    job = made.job
    told = {"warnings": [warning.text for warning in made.warnings]} if made.warnings else {}
    return {
        "line": job.line,
        "id": job.id,
        "status": "done",
        "file": job.output.name,
        "seed": made.seed if job.seed is None else job.seed,
        "seconds": round(made.seconds, 3),
        **told,
        "digest": digest,
        "sha256": checksum(job.output),
    }
