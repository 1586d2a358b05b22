"""Rounds of requests: contenders answer in turn, each in a process that stays alive if memory allows."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, combinations
from statistics import median
from typing import Any, Self, TypeVar

from ...runtime.errors import message
from .measured_requests import PROMPT
from .worker_process import Worker, WorkerFailed

Item = TypeVar("Item")
KINDS = ("first", "second_seed")
"""The kinds of requests: one with a new prompt, then one with another seed."""
WORKER = (sys.executable, "-m", "sparsectrl_lcm.benchmarks.harness.pipeline_worker")
"""The program that runs one backend."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of a table: the measured program, and the process that runs it.

    Attributes:
        name: the row's name.
        load: arguments of the question `load`, the first that its process gets.
        memory_gb: estimated peak memory of the process; the measured one replaces it after the first request.
        request: arguments that are added to each request.
        command: the program and arguments that start the process.
        process: contenders that name the same process share it; empty for a separate process.
        kinds: the kinds of requests to measure; only `first` if a second seed costs the same.
        probe: a question that its process gets once per round; the answers are kept. Empty for none.
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
        """The name of the process that runs the contender."""
        return self.process or self.name


@dataclass(slots=True)
class Result:
    """The measurements of one contender.

    Attributes:
        samples: seconds by kind of request and stage, in the order of the rounds.
        starts: seconds of each start: `load`, then `warm_up`, which opens the graphs.
        loaded: the answer to `load`.
        probes: the answers to the probe, one per round.
        peak_bytes: the largest resident memory of its process.
        failed: the reason if it failed and has no more samples; otherwise None.
    """

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    starts: list[dict[str, float]] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int | None = None
    failed: str | None = None


class Rounds:
    """Asks each contender in turn, round by round. Leaving its context ends all processes.

    Each round begins with the next contender, so that none always runs first or always after the same other one.
    Contenders that share a process stay next to each other.

    Args:
        contenders: the contenders in the order of round 0.
        request: the arguments that all requests share, from `RequestSize.as_dict`.
        memory_gb: most memory of all processes together; one process alone may take more.
        on_event: called with a contender's name and its next action.
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
        """Runs round `number`: each contender that has not failed makes one request of each of its kinds."""
        for contender in rotated(self.contenders, number):
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
        """The process of a contender, loaded and warmed up. Ends other processes if memory is short."""
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
        """GB of each process: measured if it has run, otherwise estimated."""
        needs: dict[str, float] = {}
        for contender in self._left():
            peak = self.results[contender.name].peak_bytes
            need = contender.memory_gb if peak is None else peak / 1e9
            needs[contender.process_name] = max(need, needs.get(contender.process_name, 0.0))
        return needs

    def _costs(self) -> dict[str, float]:
        """Seconds for a start of each process; 1 if it has not started yet."""
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


def rotated(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The order of a round: processes rotate by one each round, as do the contenders that share a process."""
    by_process: dict[str, list[Contender]] = {}
    for contender in contenders:
        by_process.setdefault(contender.process_name, []).append(contender)
    groups = _rotate(list(by_process.values()), number)
    return [contender for group in groups for contender in _rotate(group, number)]


def _rotate(items: list[Item], count: int) -> list[Item]:
    start = count % max(1, len(items))
    return items[start:] + items[:start]


def choose_residents(needs: Mapping[str, float], costs: Mapping[str, float], memory_gb: float) -> frozenset[str]:
    """Chooses the processes that stay alive from round to round: those with the longest starts.

    They leave room for any one of the others.

    Args:
        needs: GB of each process.
        costs: seconds for a start of each process.
        memory_gb: most GB of all running processes.
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
