"""The runner: makes clips one after the other in a separate process. If that process dies, the server goes on."""

from .interface import Job, JobFailed, Made, Preview, Runner, RunnerLost, Step
from .local_runner import LocalRunner

__all__ = ["Job", "JobFailed", "LocalRunner", "Made", "Preview", "Runner", "RunnerLost", "Step"]
