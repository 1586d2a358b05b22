"""The result of a comparison: one row for each graph, and for whole clips, by runner."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...runtime.errors import BackendError
from ...runtime.format.bundle import Bundle
from ..comparison import BOUNDS, Difference, measure, worst
from .header import CLIP, NOT_REPLAYED, PORTABLE, EngineRun
from .layers import Jump
from .saved_results import SavedResults


@dataclass(frozen=True, slots=True)
class Row:
    """One graph on one runner.

    Attributes:
        graph: its name, or `clip` for whole clips.
        runner: `runtime` (this project's loader and buffers), `library` (the backend's library alone), or, for clips,
            how they ran.
        runs: number of compared runs.
        precision: whose bounds hold.
        outputs: the worst difference of each output over all runs.
        exceeded: the measures that are out of bounds, by output.
        worst_run: the run with the largest error.
    """

    graph: str
    runner: str
    runs: int
    precision: str
    outputs: dict[str, Difference]
    exceeded: dict[str, tuple[str, ...]]
    worst_run: int

    @property
    def output(self) -> str:
        """The output with the largest error; one that is out of bounds comes first."""
        return max(self.outputs, key=lambda name: (len(self.exceeded.get(name, ())), self.outputs[name].error))

    @property
    def passed(self) -> bool:
        """Whether all outputs are within bounds, and the runner ran as it should."""
        return not self.exceeded and self.runner != NOT_REPLAYED


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, and what they hold for.

    Attributes:
        run: the backend, its version, device and precision.
        size: of the clips.
        rows: by graph and runner.
        missing: graphs, and `clip`, that not all runners have finished, since the run was interrupted.
        jumps: for each graph that failed, the first tensor whose error jumps; None if there is no such tensor.
    """

    run: EngineRun
    size: str
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()
    jumps: dict[str, Jump | None] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was compared, nothing is missing, and all rows passed."""
        return bool(self.rows) and not self.missing and all(row.passed for row in self.rows)

    @property
    def failed_graphs(self) -> tuple[str, ...]:
        """The graphs, and clips, that did not pass."""
        return tuple(dict.fromkeys(row.graph for row in self.rows if not row.passed))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "passed": self.passed,
            "size": self.size,
            **self.run.model_dump(mode="json", exclude={"runners", "unfinished"}),
            "rows": [asdict(row) for row in self.rows],
            "missing": list(self.missing),
            "jumps": {graph: jump and asdict(jump) for graph, jump in self.jumps.items()},
        }


def judge(bundle: Bundle, results: SavedResults, graphs: Sequence[str]) -> Report:
    """Compares the saved outputs of a backend with those of the portable graphs.

    Args:
        bundle: the bundle; names the outputs.
        results: the saved results; a backend has run.
        graphs: the graphs to judge, and `clip`.

    Raises:
        BackendError: outputs cannot be read, or there are no bounds for a precision.
    """
    run = results.header.run
    assert run is not None
    rows = [_row(bundle, results, graph, runner) for graph in graphs for runner in run.runners.get(graph, ())]
    missing = tuple(graph for graph in graphs if not _complete(results, run, graph))
    return Report(run, str(results.header.size), tuple(rows), missing)


def _complete(results: SavedResults, run: EngineRun, graph: str) -> bool:
    """Whether all runners of a graph have finished. A graph that no request runs has none."""
    runners = run.runners.get(graph)
    return graph not in run.unfinished and runners is not None and bool(runners or not results.header.runs[graph])


def _row(bundle: Bundle, results: SavedResults, graph: str, runner: str) -> Row:
    run = results.header.run
    assert run is not None
    precision = run.precisions.get(graph, run.precision)
    if precision not in BOUNDS:
        raise BackendError("verify", f"there are no bounds for {precision}")
    found: dict[str, list[Difference]] = {}
    runs = results.header.runs[graph]
    names = ["frames"] if graph == CLIP else [item.name for item in bundle.graph(graph).outputs]
    for index in range(runs):
        expected = results.outputs(graph, PORTABLE, index, names)
        actual = results.outputs(graph, runner, index, names)
        for name, values in expected.items():
            found.setdefault(name, []).append(measure(actual[name], values))
    outputs = {name: worst(differences) for name, differences in found.items()}
    exceeded = {name: BOUNDS[precision].exceeded(difference) for name, difference in outputs.items()}
    exceeded = {name: measures for name, measures in exceeded.items() if measures}
    worst_run = max(range(runs), key=lambda index: max(differences[index].error for differences in found.values()))
    return Row(graph, runner, runs, precision, outputs, exceeded, worst_run)
