"""This project's GPU backends whose libraries are installed: builds engines, then measures whole requests."""

from dataclasses import replace

from gpu_contenders import build_engines
from gpu_worker import measure_pipeline
from sparsectrl_lcm.runtime.backends import availability

from .processes import CannotRun, Settings, Write
from .requests import job_of, percentiles


def measure(settings: Settings, write: Write) -> None:
    """Writes a row for the build and one for each mode."""
    if (reason := availability(settings.stage).reason) is not None:
        raise CannotRun(reason)
    if not (settings.bundle / "manifest.json").exists():
        raise CannotRun("there are no weights; the stage `weights` did not end")
    job = job_of(settings, settings.stage)
    for row in build_engines(replace(job, role="build")):
        write(row)
    for row in measure_pipeline(replace(job, seconds=settings.left)):
        write(row | percentiles(row.get("samples", {})))
