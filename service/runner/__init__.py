"""The runners: each makes clips one after the other in a process of its own. If one dies, the server goes on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .interface import Encoding, Event, Job, JobFailed, Made, OnEvent, Preview, Runner, RunnerLost, RunnerStatus, Step

if TYPE_CHECKING:
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


_OF_THE_SERVER = {"LocalRunner": "local_runner", "RunnerPool": "runner_pool"}
"""The modules of what the processes of a runner do not need. They import this package too, and start faster so."""


def __getattr__(name: str) -> Any:
    if name not in _OF_THE_SERVER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_OF_THE_SERVER[name]}", __name__), name)
