"""The runners of one machine, one process for each device, behind the interface of a single runner."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ...runtime.errors import SparseCtrlLcmError
from ..json_logs import logs_of
from .interface import Encoding, Event, Job, JobFailed, Made, OnEvent, RunnerLost, RunnerStatus
from .local_runner import LocalRunner

log = logging.getLogger(__package__)

KEPT = 4
"""How many conditionings a runner is taken to keep: its limit is in bytes, which only its process knows."""


@dataclass(slots=True, eq=False)
class _Member:
    """A runner with what the pool knows of it.

    Attributes:
        jobs: how many jobs need its pipeline.
        begun: when its last job began, as a count of all jobs.
        weights: name of the weights that its pipeline has or is given; None means those of the bundle.
        kept: the conditionings that it probably keeps, oldest first, all made with these weights.
    """

    name: str
    runner: LocalRunner
    jobs: int = 0
    begun: int = 0
    weights: str | None = None
    kept: "OrderedDict[str, None]" = field(default_factory=OrderedDict)

    def keep(self, conditioning: str) -> None:
        self.kept[conditioning] = None
        self.kept.move_to_end(conditioning)
        if len(self.kept) > KEPT:
            self.kept.popitem(last=False)

    def forget(self, weights: str | None = None) -> None:
        """Notes that the pipeline has these weights, and no conditioning is kept."""
        self.weights = weights
        self.kept.clear()

    @contextmanager
    def at_pipeline(self, job: Job) -> Iterator[None]:
        """The block counts as a job that needs the pipeline, which keeps the conditioning if the block succeeds."""
        self.jobs += 1
        if job.weights != self.weights:
            self.forget(job.weights)
        try:
            yield
            self.keep(job.conditioning)
        finally:
            self.jobs -= 1

    def cost(self, job: Job) -> tuple[bool, int, bool, bool, int]:
        """Returns a value to compare members by: the lowest one gets the job."""
        other_weights, unknown = job.weights != self.weights, job.conditioning not in self.kept
        return not self.runner.ready, self.jobs, other_weights, unknown, self.begun

    @property
    def status(self) -> RunnerStatus:
        if self.runner.ready:
            return RunnerStatus(self.name, "busy" if self.jobs else "ready")
        problem = self.runner.problem
        return RunnerStatus(self.name, "failed" if problem else "loading", problem)


class RunnerPool:
    """A `Runner` of several local ones. What happens to one of them touches its own job only.

    A job goes to a free runner; among several, to one that has its weights, then to one that keeps its conditioning,
    otherwise to the one that has been free longest. A runner whose options are wrong is left out. If those of all are
    wrong, the pool is `refused`.
    All methods belong to one event loop.

    Args:
        runners: the runners by name.
    """

    def __init__(self, runners: Mapping[str, LocalRunner]) -> None:
        self._members = [_Member(name, runner) for name, runner in runners.items()]
        self._begun = 0

    async def start(self) -> None:
        """Begins to load the models and returns at once."""
        for member in self._members:
            with logs_of(runner=member.name):
                await member.runner.start()

    async def stop(self) -> None:
        """Kills the processes and ends all jobs with `RunnerLost("stopped")`."""
        await asyncio.gather(*(member.runner.stop() for member in self._members))

    @property
    def capacity(self) -> int:
        """See `Runner.capacity`."""
        return sum(member.runner.ready for member in self._members)

    @property
    def problem(self) -> str | None:
        """See `Runner.problem`: that of the first runner with one, while none is ready."""
        if self.capacity:
            return None
        return next((member.runner.problem for member in self._members if member.runner.problem), None)

    @property
    def about(self) -> dict[str, Any]:
        """See `Runner.about`: what the first runner that has loaded reported."""
        return next((member.runner.about for member in self._members if member.runner.about), {})

    @property
    def runners(self) -> list[RunnerStatus]:
        """See `Runner.runners`."""
        return [member.status for member in self._members]

    async def refused(self) -> SparseCtrlLcmError:
        """See `Runner.refused`: returns the first runner's error once all are refused."""
        return (await asyncio.gather(*map(self._refused, self._members)))[0]

    async def _refused(self, member: _Member) -> SparseCtrlLcmError:
        error = await member.runner.refused()
        if len(self._members) > 1:
            log.error("a runner is left out: %s", error, extra={"runner": member.name})
        return error

    async def run(self, job: Job, on_event: OnEvent) -> Made:
        """Makes a clip; see `Runner.run`."""
        member = min(self._members, key=lambda member: member.cost(job))
        self._begun += 1
        member.begun = self._begun
        with ExitStack() as at_pipeline:
            at_pipeline.enter_context(member.at_pipeline(job))

            def listen(event: Event) -> None:
                if isinstance(event, Encoding):
                    at_pipeline.close()
                on_event(event)

            try:
                made = await member.runner.run(job, listen)
            except RunnerLost as lost:
                member.forget()
                raise lost.of(member.name) from None
            except JobFailed as error:
                if error.field == "weights":  # it has those of the bundle again
                    member.forget()
                raise
        return replace(made, runner=member.name)

    def cancel(self, job_id: str) -> None:
        """Ends a job; see `Runner.cancel`."""
        for member in self._members:
            member.runner.cancel(job_id)
