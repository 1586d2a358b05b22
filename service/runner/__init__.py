"""The runners: each makes clips one after the other in a process of its own. If one dies, the server goes on."""

from .interface import Encoding, Event, Job, JobFailed, Made, OnEvent, Preview, Runner, RunnerLost, RunnerStatus, Step
from .local_runner import LocalRunner
from .runner_pool import RunnerPool

__all__ = [
    "Encoding",
    "Event",
    "Job",
    "JobFailed",
    "LocalRunner",
    "Made",
    "OnEvent",
    "Preview",
    "Runner",
    "RunnerLost",
    "RunnerPool",
    "RunnerStatus",
    "Step",
]
