"""The runner: makes clips one after the other in a process of its own, whose death does not harm the server."""

from .interface import Job, JobFailed, Made, Preview, Runner, RunnerLost, Step
from .local_runner import LocalRunner

__all__ = ["Job", "JobFailed", "LocalRunner", "Made", "Preview", "Runner", "RunnerLost", "Step"]
