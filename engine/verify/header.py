"""What a folder of results says about itself: requests, runs, and the backend that ran."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ...runtime.backends import BACKENDS
from ...runtime.format.bundle import Bundle
from ...runtime.format.clip_layout import ClipSize
from ...runtime.format.manifest import Record

CLIP = "clip"
"""Stands for a graph where whole clips are compared."""
PORTABLE = "portable"
"""The runner of the portable graphs."""
RUNTIME = "runtime"
"""The runner that is shipped: the project's own loader and buffers."""
LIBRARY = "library"
"""The runner of the backend's library alone. It tells a fault of an engine from a fault of this runtime."""
PLAIN, REPLAYED, ENGINE_GRAPHS = "plain", "replayed", "engine graphs"
"""How whole clips run: engine by engine, as one CUDA graph, or with graphs that the engines capture themselves."""
NOT_REPLAYED = "not replayed"
"""The runner of whole clips that should have been replayed as CUDA graphs, if at least one was not."""
_GRAPH_RUNNERS = {RUNTIME, LIBRARY}
_CLIP_RUNNERS = {PLAIN, REPLAYED, ENGINE_GRAPHS, NOT_REPLAYED}


class EngineRun(Record):
    """The run of a backend's engines.

    Attributes:
        backend: its name.
        version: of its library.
        device: the GPU, or CPU.
        precision: of the engines.
        precisions: of each graph; a graph without an engine runs in fp32.
        unfinished: the graphs, and `clip`, that not all runners have finished.
        runners: the runners of each graph and of whole clips that have finished.
        notes: what was not compared, and why.
    """

    backend: str
    version: str
    device: str
    precision: str
    precisions: dict[str, str]
    unfinished: tuple[str, ...]
    runners: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Header(Record):
    """What a folder holds.

    Attributes:
        size: of the clips.
        keyframe_slots: keyframes that the recorded inputs have room for; None for the manifest's number.
        graphs: checksums of all portable graphs of the bundle and their weights.
        runs: the number of recorded runs of each graph, and of whole clips; 0 if no request runs a graph.
        run: the run of a backend; None if only requests were recorded.
    """

    format: Literal["sparsectrl-lcm-verify-1"] = "sparsectrl-lcm-verify-1"
    size: ClipSize
    keyframe_slots: Annotated[int, Field(ge=1)] | None = None
    graphs: dict[str, tuple[str, ...]]
    runs: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    run: EngineRun | None = None

    def faults(self, bundle: Bundle) -> Iterator[str]:
        """What no comparison of the bundle writes."""
        if min(self.size.width, self.size.height, self.size.frames) < 1:
            yield f"its clips are of {self.size}"
        for graph in self.runs.keys() - {*bundle.manifest.graphs, CLIP}:
            yield f"it has runs of {graph!r}, which is not in the bundle"
        if not any(self.runs.values()):
            yield "it has no runs"
        if self.runs.get(CLIP) == 0:
            yield "it has no runs of whole clips"
        if self.run is not None and self.run.backend not in BACKENDS:
            yield f"its backend {self.run.backend!r} is unknown"
        for graph, runners in self.run.runners.items() if self.run is not None else ():
            if runners and not self.runs.get(graph):
                yield f"it has runners of {graph!r}, but no runs"
            for runner in set(runners) - (_CLIP_RUNNERS if graph == CLIP else _GRAPH_RUNNERS):
                yield f"the runner {runner!r} of {graph!r} is unknown"
