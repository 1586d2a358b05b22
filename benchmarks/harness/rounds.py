"""Contenders that answer in turn, each in a process that stays alive where memory allows."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, combinations
from statistics import median
from typing import Any, Self

from ...runtime.errors import message
from .processes import Worker, WorkerFailed
from .requests import PROMPT

KINDS = ("first", "second_seed")
"""A request with a new prompt, and one with another seed after it."""
WORKER = (sys.executable, "-m", "sparsectrl_lcm.benchmarks.harness.worker")


@dataclass(frozen=True, slots=True)
class Contender:
    """What is measured.

    Attributes:
        name: as in tables.
        load: what its process is told at its start.
        memory_gb: what the process takes at its highest, as far as is known before it has run.
        request: what is added to each request.
        command: what starts the process.
        process: contenders that name the same one share it; by default its own.
        kinds: the kinds of requests that differ in cost.
        probe: a question to its process that is asked once a round, its answers kept; empty for none.
    """

    name: str
    load: dict[str, Any]
    memory_gb: float
    request: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = WORKER
    process: str = ""
    kinds: tuple[str, ...] = KINDS
    probe: str = ""

    @property
    def process_name(self) -> str:
        """The process that it runs in."""
        return self.process or self.name


@dataclass(slots=True)
class Result:
    """What was measured of a contender.

    Attributes:
        samples: seconds by kind of request and stage, in the order of the rounds.
        starts: seconds of each start: `load`, and `warm_up` with the graphs' opening.
        loaded: what the process said when it was loaded.
        probes: what it answered to the probe.
        peak_bytes: the largest resident memory of its process.
        failed: why it has no more samples.
    """

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    starts: list[dict[str, float]] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int | None = None
    failed: str | None = None


class Rounds:
    """Asks each contender in turn, round by round. Leaving its context ends all processes.

    Args:
        contenders: in the order in which they answer; those that share a process next to each other.
        request: what all requests have in common, as `RequestSize.as_dict` gives it.
        memory_gb: bound on what the processes may take together; one alone may take more.
        on_event: told what is being done, and by whom.
        save: files for the frames of the first warm-up, by contender.
    """

    def __init__(
        self,
        contenders: Iterable[Contender],
        request: Mapping[str, Any],
        memory_gb: float,
        on_event: Callable[[str, str], None] = lambda contender, what: None,
        save: Mapping[str, str] | None = None,
    ) -> None:
        self.contenders = tuple(contenders)
        self.results = {contender.name: Result() for contender in self.contenders}
        self._request = dict(request)
        self._memory_gb = memory_gb
        self._on_event = on_event
        self._save = dict(save or {})
        self._workers: dict[str, Worker] = {}
        self._warm: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self._workers):
            self._end(process)

    def run(self, number: int) -> None:
        """One round: each contender that has not failed makes one request of each of its kinds."""
        for contender in self.contenders:
            result = self.results[contender.name]
            if result.failed is None:
                try:
                    self._turn(contender, result, number)
                except WorkerFailed as error:
                    at_fault = "" if error.field == "backend" else error.field
                    result.failed = message(at_fault, error.reason, error.remedy)
                    self._on_event(contender.name, f"failed: {result.failed}")
                    self._end(contender.process_name)

    def _turn(self, contender: Contender, result: Result, number: int) -> None:
        worker = self._ready(contender, result)
        for seed, kind in enumerate(contender.kinds, start=100 * number):
            self._on_event(contender.name, kind.replace("_", " "))
            prompt = f"{PROMPT}, {number}"
            self._keep(result, kind, worker.ask("generate", prompt=prompt, seed=seed, **self._asked(contender)))
        if contender.probe:
            result.probes.append(worker.ask(contender.probe))

    def _asked(self, contender: Contender) -> dict[str, Any]:
        return {**self._request, **contender.request}

    def _keep(self, result: Result, kind: str, reply: dict[str, Any]) -> None:
        samples = result.samples.setdefault(kind, {})
        for stage, seconds in reply["seconds"].items():
            samples.setdefault(stage, []).append(seconds)
        result.peak_bytes = max(filter(None, (result.peak_bytes, reply["peak_bytes"])), default=None)

    def _ready(self, contender: Contender, result: Result) -> Worker:
        """The process of a contender, loaded and warm; others end where there is no room for them."""
        process = contender.process_name
        begin = time.perf_counter()
        if process not in self._workers:
            residents = choose_residents(self._needs(), self._costs(), self._memory_gb)
            for other in self._workers.keys() - residents:
                self._end(other)
            self._on_event(contender.name, "load")
            self._workers[process] = Worker(contender.command)
            result.loaded = self._workers[process].ask("load", **contender.load)
        worker, loaded = self._workers[process], time.perf_counter()
        if contender.name not in self._warm:
            self._on_event(contender.name, "warm-up")
            save = self._save.pop(contender.name, None)
            reply = worker.ask("warm_up", save=save, **self._asked(contender))
            result.peak_bytes = max(filter(None, (result.peak_bytes, reply["peak_bytes"])), default=None)
            result.starts.append({"load": loaded - begin, "warm_up": time.perf_counter() - loaded})
            self._warm.add(contender.name)
        return worker

    def _needs(self) -> dict[str, float]:
        """GB of each process, measured where it has run."""
        needs: dict[str, float] = {}
        for contender in self._left():
            peak = self.results[contender.name].peak_bytes
            need = contender.memory_gb if peak is None else peak / 1e9
            needs[contender.process_name] = max(need, needs.get(contender.process_name, 0.0))
        return needs

    def _costs(self) -> dict[str, float]:
        """Seconds that a start of each process takes; little where that is not known yet."""
        costs: dict[str, float] = {}
        for contender in self._left():
            last = self.results[contender.name].starts[-1:] or [{"unknown": 1.0}]
            costs[contender.process_name] = costs.get(contender.process_name, 0.0) + sum(last[0].values())
        return costs

    def _left(self) -> list[Contender]:
        return [contender for contender in self.contenders if self.results[contender.name].failed is None]

    def _end(self, process: str) -> None:
        with suppress(KeyError):
            self._workers.pop(process).close()
        self._warm -= {contender.name for contender in self.contenders if contender.process_name == process}


def choose_residents(needs: Mapping[str, float], costs: Mapping[str, float], memory_gb: float) -> frozenset[str]:
    """The processes that stay alive from round to round: those whose starts take longest.

    Beside them there is room for any one of the others.

    Args:
        needs: GB of each process.
        costs: seconds of its start.
        memory_gb: what all that are alive may take.
    """

    def fits(chosen: frozenset[str]) -> bool:
        others = (need for name, need in needs.items() if name not in chosen)
        return sum(needs[name] for name in chosen) + max(others, default=0.0) <= memory_gb

    subsets = chain.from_iterable(combinations(needs, count) for count in range(len(needs) + 1))
    fitting = [chosen for chosen in map(frozenset, subsets) if fits(chosen)]
    return max(fitting, key=lambda chosen: sum(costs[name] for name in chosen), default=frozenset())


def summarize(samples: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, smallest and largest of the samples, by kind of request and stage."""
    return {
        kind: {
            stage: {"median": median(values), "min": min(values), "max": max(values)}
            for stage, values in stages.items()
        }
        for kind, stages in samples.items()
    }
