"""The runner: makes clips one after the other, in a process of its own that may die without harm to the server."""

from .jobs import Job, JobFailed, Made, Preview, Runner, RunnerLost, Step
from .local import LocalRunner

__all__ = ["Job", "JobFailed", "LocalRunner", "Made", "Preview", "Runner", "RunnerLost", "Step"]
