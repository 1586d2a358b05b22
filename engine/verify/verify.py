"""Compares a backend's engines with the portable graphs on real requests: the entry point of `verify`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from ...runtime.backend_interface import Executor
from ...runtime.backends import BACKENDS, availability, choose_backend, find_backend, open_executor
from ...runtime.errors import BackendError, InvalidRequest
from ...runtime.example_requests import sample_requests, sample_size
from ...runtime.format.bundle import Bundle
from ...runtime.format.clip_layout import ClipSize
from ...runtime.format.engine_keys import graph_checksums
from ...runtime.format.engine_sets import EngineSet, parse_set_name, set_names
from ...runtime.gpu.device import probe
from ...runtime.load_options import LoadOptions
from ..build import check_size
from .header import (
    CLIP,
    ENGINE_GRAPHS,
    LIBRARY,
    NOT_REPLAYED,
    PLAIN,
    PORTABLE,
    REPLAYED,
    RUNTIME,
    EngineRun,
    Header,
)
from .interruptions import check_stopped, stoppable
from .layers import first_jump
from .marked_graphs import Suspect
from .recording import record, with_slots_of
from .report import Report, judge
from .runners import RuntimeRunner, portable_runner, quiet, run
from .saved_results import SavedResults, output_folder

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to compare.

    Attributes:
        backend: a name of `BACKENDS`; None takes that of the loaded results, or the one that requests would take.
        precision: of the engines; None takes the first that was built.
        width, height: of the clips; None takes a size that engines were built for.
        graphs: the graphs to compare; empty for all, and whole clips.
        layers: whether to find the first tensor whose error jumps, in each graph that is out of bounds.
        save: a folder for inputs and outputs; new or empty.
        load: a folder that an earlier run saved.
    """

    backend: str | None = None
    precision: str | None = None
    width: int | None = None
    height: int | None = None
    graphs: tuple[str, ...] = ()
    layers: bool = False
    save: Path | None = None
    load: Path | None = None


@stoppable()
@quiet()
def verify(bundle: Bundle, options: VerifyOptions, on_progress: OnProgress = lambda text, fraction: None) -> Report:
    """Compares engines with the portable graphs.

    Args:
        bundle: the bundle.
        options: what to compare.
        on_progress: called with the current step and the fraction that is done, 0 to 1.

    Raises:
        InvalidRequest: an option is not allowed.
        BackendError: the backend cannot run here, or results cannot be loaded.
        OutputError: results cannot be saved.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    loaded = None if options.load is None else SavedResults.load(options.load, bundle)
    if loaded is not None:
        bundle = bundle.with_keyframe_slots(loaded.header.keyframe_slots)
    wanted = _wanted(bundle, options, loaded)
    if loaded is not None and _answers(loaded, options):
        if options.save is not None:
            raise InvalidRequest("save", "the loaded folder has these results already", "leave --save out")
        report = judge(bundle, loaded, wanted)
        return _with_layers(bundle, loaded, report, on_progress) if options.layers else report
    comparison = _Comparison(bundle, options, loaded)
    with output_folder(options.save, options.load) as folder:
        return comparison.run(folder, wanted, on_progress)


class _Comparison:
    """The run of one backend."""

    def __init__(self, bundle: Bundle, options: VerifyOptions, loaded: SavedResults | None) -> None:
        self.options = options
        self.loaded = loaded
        backend = options.backend or choose_backend(bundle, LoadOptions(precision=options.precision))
        self.record = find_backend(backend)
        found = availability(backend)
        if found.error is not None:
            raise found.error
        self.version = found.version or ""
        self.size = loaded.header.size if loaded is not None else _size(bundle, backend, options)
        self.engines = self._engines(bundle.folder)
        self.bundle = with_slots_of(self.engines, bundle, loaded)
        self.load_options = LoadOptions(precision=self.engines.index.precision if self.engines else options.precision)

    def _engines(self, folder: Path) -> EngineSet | None:
        """The engines that requests of the size take; None for the portable graphs."""
        precision = self.options.precision
        found = next(self.record.chosen_sets(folder, precision, self.size), None)
        if found is None and not (self.record.portable and precision in (None, "fp32")):
            size = self.size if "width" in self.record.build_options else None
            self.record.engine_set(folder, precision or self.record.precisions[0], size)  # names the command
        return found

    def run(self, folder: Path, wanted: Sequence[str], on_progress: OnProgress) -> Report:
        """Records or copies the requests, runs everything that is missing, and judges."""
        steps, done = 2 * len(wanted) + 1, 0

        def report_step(text: str) -> None:
            nonlocal done
            on_progress(text, done / steps)
            done += 1

        report_step("recording requests")
        graphs = [graph for graph in wanted if graph != CLIP]
        if self.loaded is not None:
            results = self.loaded.copy_recording(folder, wanted)
        else:
            manifest = self.bundle.manifest
            checksums = {graph: graph_checksums(manifest, graph) for graph in manifest.graphs}
            slots = manifest.keyframe_slots
            results = SavedResults(folder, Header(size=self.size, keyframe_slots=slots, graphs=checksums))
            record(self.bundle, results, graphs, clips=CLIP in wanted)
        for graph in graphs:
            report_step(f"{graph}: portable graph")
            if not results.has(graph, PORTABLE):
                run(portable_runner(self.bundle, graph), results, graph)
        results.update(run=self._run_record(wanted))
        library = self.record.library_runner is not None and self.engines is not None
        executor = open_executor(self.bundle, self.record.name, self.load_options)
        try:
            for graph in graphs:
                report_step(f"{graph}: {self.record.name}")
                if results.header.runs[graph]:
                    self._run_graph(executor, results, graph)
                    _finish(results, graph, (RUNTIME,), last=not library)
                else:  # such as the VAE's encoder of a bundle that takes no pictures
                    _finish(results, graph, (), (f"{graph} was not compared: no request runs it",))
            if CLIP in wanted:
                report_step("whole clips")
                self._run_clips(executor, results)
        finally:
            executor.close()
        for graph in graphs if library else ():  # last, so that a fault of the library alone costs no other result
            if results.header.runs[graph]:
                self._run_library(results, graph)
        report = judge(self.bundle, results, wanted)
        return _with_layers(self.bundle, results, report, on_progress) if self.options.layers else report

    def _run_record(self, wanted: Sequence[str]) -> EngineRun:
        precision = self.engines.index.precision if self.engines else "fp32"
        built = self.engines.index.engines if self.engines else {}
        return EngineRun(
            backend=self.record.name,
            version=self.version,
            device=str(probe()) if self.record.on_gpu else "CPU",
            precision=precision,
            precisions={graph: precision if graph in built else "fp32" for graph in wanted if graph != CLIP},
            unfinished=tuple(wanted),
        )

    def _run_graph(self, executor: Executor, results: SavedResults, graph: str) -> None:
        """Runs a graph through this runtime."""
        run(
            RuntimeRunner(lambda: executor.open_graph(graph, self.size), self.bundle.graph(graph)),
            results,
            graph,
        )

    def _run_library(self, results: SavedResults, graph: str) -> None:
        """Runs a graph through the backend's library alone; a note says why, if that is not possible."""
        module = import_module(f"..{self.record.library_runner}", __package__)
        try:
            run(module.library_runner(self.bundle, self.engines, graph, self.size, LIBRARY), results, graph)
        except BackendError as error:
            _finish(results, graph, (), (f"{graph} did not run on the library alone: {error.reason}",))
        else:
            _finish(results, graph, (LIBRARY,))

    def _run_clips(self, executor: Executor, results: SavedResults) -> None:
        """Runs whole requests; on a backend with CUDA graphs, with and without them."""
        requests = list(sample_requests(self.bundle, self.size))

        def run_plain(executor: Executor) -> str:
            for index, request in enumerate(requests):
                results.write_outputs(CLIP, PLAIN, index, {"frames": executor.run(request, None)[0]})
            return PLAIN

        if "cuda_graphs" not in self.record.load_options:
            _finish(results, CLIP, (run_plain(executor),))
            return
        clips, replays = [], []
        for request in requests:  # the first request with the same engine runs is captured
            other = replace(request, prompt=f"{request.prompt}, at night", seed=request.seed + len(requests))
            executor.run(other, None)
            clips.append(executor.run(request, None)[0])
            replays.append(getattr(executor, "replayed", None))
        graphs, notes = _name_of(replays)
        for index, frames in enumerate(clips):
            results.write_outputs(CLIP, graphs, index, {"frames": frames})
        executor.close()  # its memory is needed
        plain = open_executor(self.bundle, self.record.name, replace(self.load_options, cuda_graphs=False))
        try:
            _finish(results, CLIP, (run_plain(plain), graphs), notes)
        finally:
            plain.close()


def _name_of(replays: Sequence[bool | None]) -> tuple[str, tuple[str, ...]]:
    """The runner of clips that ran with CUDA graphs, and notes. `replays` is `GpuExecutor.replayed` of each."""
    if None in replays:
        return ENGINE_GRAPHS, ()
    if all(replays):
        return REPLAYED, ()
    count = f"{replays.count(False)} of {len(replays)} clips"
    return NOT_REPLAYED, (f"{count} were not replayed as a CUDA graph; a warning in the log may say why",)


def _finish(
    results: SavedResults, graph: str, runners: tuple[str, ...], notes: tuple[str, ...] = (), last: bool = True
) -> None:
    """Adds runners of a graph to the header; `last` if no other one follows."""
    check_stopped()
    done = results.header.run
    assert done is not None
    finished = (*done.runners.get(graph, ()), *runners)
    changes: dict[str, object] = {"runners": {**done.runners, graph: finished}, "notes": (*done.notes, *notes)}
    if last:
        changes["unfinished"] = tuple(name for name in done.unfinished if name != graph)
    results.update(run=done.model_copy(update=changes))


def _with_layers(bundle: Bundle, results: SavedResults, report: Report, on_progress: OnProgress) -> Report:
    """Adds the first tensor whose error jumps to each graph that is out of bounds."""
    backend, jumps = BACKENDS[report.run.backend], {}
    failed = [row for row in report.rows if row.exceeded and row.runner == RUNTIME]
    for row in failed:
        on_progress(f"{row.graph}: looking for the first wrong tensor", 1.0)
        engines = next(backend.chosen_sets(bundle.folder, report.run.precision, results.header.size), None)
        names = [item.name for item in bundle.graph(row.graph).inputs]
        feeds = results.inputs(row.graph, row.worst_run, names)
        jumps[row.graph] = first_jump(
            Suspect(bundle, backend.name, row.precision, results.header.size, engines, row.graph, feeds)
        )
    return replace(report, jumps=jumps)


def _wanted(bundle: Bundle, options: VerifyOptions, loaded: SavedResults | None) -> list[str]:
    """The graphs to compare, in the bundle's order, and `clip`."""
    known = [*bundle.manifest.graphs, CLIP] if loaded is None else list(loaded.header.runs)
    for graph in options.graphs:
        if graph not in known:
            what = "is not in this bundle" if loaded is None else "was not saved"
            raise InvalidRequest("graph", f"{graph!r} {what}", f"allowed are {', '.join(known)}")
    return [graph for graph in known if graph in (options.graphs or known)]


def _answers(loaded: SavedResults, options: VerifyOptions) -> bool:
    """Whether the loaded results are those of the backend and precision asked for."""
    run = loaded.header.run
    if (options.width, options.height) not in ((None, None), (loaded.header.size.width, loaded.header.size.height)):
        raise InvalidRequest("size", f"the loaded results are of {loaded.header.size}", "leave --size out")
    return run is not None and options.backend in (None, run.backend) and options.precision in (None, run.precision)


def _size(bundle: Bundle, backend: str, options: VerifyOptions) -> ClipSize:
    """The size to compare: one that engines were built for, or else a small one."""
    default = sample_size(bundle)
    if options.width is not None and options.height is not None:
        default = ClipSize(width=options.width, height=options.height, frames=default.frames)
        check_size(bundle.manifest, default)
    built = [of for of, _ in map(parse_set_name, set_names(bundle.folder, backend)) if of is not None]
    if options.width is not None:
        built = [of for of in built if (of.width, of.height) == (default.width, default.height)]
    sizes = bundle.manifest.sizes
    usual = ClipSize(width=sizes.width, height=sizes.height, frames=sizes.frames)
    return next((of for of in (default, usual, *built) if of in built), default)
