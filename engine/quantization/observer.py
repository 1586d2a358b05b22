"""Observes the inputs of matrix layers while the sample requests run, on any library that runs ONNX graphs."""

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.cpu.onnxruntime import OnnxRuntimeSession
from ...runtime.cpu.sessions import Array, Session, Sessions
from ...runtime.example_requests import run_samples, sample_size, small_size
from ...runtime.format.bundle import Bundle
from ...runtime.format.clip_layout import ONE_PROMPT, ClipSize
from ...runtime.format.decoders import DECODERS
from ...runtime.format.engine_keys import graph_checksums
from ...runtime.format.manifest import GraphRecord, TensorRecord, resolve_shape
from ..rewrites.node_helpers import Rewriting
from ..rewrites.typed_graph import write_typed
from .layers import input_axis, layer_input, quantizable, weight_shape

CHANNELS = "observed_channels"

OpenSession = Callable[[Path, GraphRecord, Mapping[str, tuple[int, ...]]], Session]
"""Opens an observed graph, given its file, its inputs and outputs, and the shapes of its inputs for one prompt."""


def open_on_onnxruntime(path: Path, record: GraphRecord, shapes: Mapping[str, tuple[int, ...]]) -> Session:
    """Opens a graph on ONNX Runtime's CPU provider."""
    return OnnxRuntimeSession(path, weights=path.parent)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What came into a layer.

    Attributes:
        channels: the largest magnitude of each of the C input channels, fp32 [C].
        means: the mean of each channel, where each run counts the same, fp32 [C]; None if it was not observed.
    """

    channels: NDArray[np.float32]
    means: NDArray[np.float32] | None = None

    @property
    def largest(self) -> float:
        """The largest magnitude of all."""
        return float(self.channels.max())


class ObservedGraph:
    """A graph with a further output: statistics of the inputs of its matrix layers.

    Args:
        model: a portable or typed graph; it is changed in place.
        means: whether the means are observed, besides the largest magnitudes.
    """

    def __init__(self, model: ir.Model, means: bool = False) -> None:
        self._reductions = ("ReduceMax", "ReduceMean") if means else ("ReduceMax",)
        self._runs = 0
        self._layers: dict[str, str] = {}
        sources: dict[str, tuple[ir.Value, ir.Node]] = {}
        for node in quantizable(model):
            source = layer_input(node)
            self._layers[str(node.name)] = str(source.name)
            sources.setdefault(str(source.name), (source, node))
        self._sizes = {name: weight_shape(node)[input_axis(node)] for name, (_, node) in sources.items()}
        self._seen = {name: np.zeros((len(self._reductions), size)) for name, size in self._sizes.items()}
        _add_output(model.graph, list(sources.values()), self._reductions)

    @property
    def output(self) -> TensorRecord:
        """The further output of one run: for each source its channels' magnitudes, then means; fp32, in one row."""
        return TensorRecord(name=CHANNELS, dtype="float32", shape=(self._length,))

    @property
    def _length(self) -> int:
        return len(self._reductions) * sum(self._sizes.values())

    def see(self, channels: Array) -> None:
        """Adds the further output of one run, one after another for each prompt."""
        for run in channels.reshape(-1, max(1, self._length)):
            start = 0
            for seen in self._seen.values():
                found = run[start : start + seen.size].reshape(seen.shape)
                np.maximum(seen[0], found[0], out=seen[0])
                seen[1:] += found[1:]
                start += seen.size
            self._runs += 1

    def statistics(self) -> dict[str, Statistics]:
        """Returns the statistics so far by the layer's name, without layers that did not run or saw only zeros."""
        found = {}
        for layer, source in self._layers.items():
            largest, *sums = self._seen[source]
            if largest.any():
                means = (sums[0] / self._runs).astype(np.float32) if sums else None
                found[layer] = Statistics(largest.astype(np.float32), means)
        return found


def _add_output(graph: ir.Graph, sources: list[tuple[ir.Value, ir.Node]], reductions: Collection[str]) -> None:
    """Adds the output of `ObservedGraph` to a graph."""
    added = Rewriting(graph, "observed")
    first = added.integers(0)
    channels = []
    for source, layer in sources:
        size = weight_shape(layer)[input_axis(layer)]
        value = source
        if layer.op_type == "Conv":  # [N, C, ...] -> [N, ..., C]
            rank = len(weight_shape(layer))
            value = added.op("Transpose", value, perm=[0, *range(2, rank), 1])
        flat = added.op("Reshape", value, added.integers(-1, size))
        for reduction in reductions:
            operand = added.op("Abs", flat) if reduction == "ReduceMax" else flat
            reduced = added.op(reduction, operand, first, keepdims=0)
            channels.append(added.op("Cast", reduced, to=int(ir.DataType.FLOAT)))
    joined = added.join(*channels) if channels else added.constant(np.zeros(0, np.float32))
    result = added.op("Identity", joined)
    result.name, result.type = CHANNELS, ir.TensorType(ir.DataType.FLOAT)
    sizes = [weight_shape(layer)[input_axis(layer)] for _, layer in sources]
    result.shape = ir.Shape([len(reductions) * sum(sizes)])
    graph.extend(added.nodes)
    graph.outputs.append(result)


class ObservingSessions:
    """Runs the observed graphs, and the other graphs of a bundle through other sessions.

    Args:
        bundle: the bundle.
        observed: for each graph name, the file of the observed graph and the graph.
        open_session: opens an observed graph.
        others: the sessions of the graphs that are not observed.
    """

    def __init__(
        self,
        bundle: Bundle,
        observed: Mapping[str, tuple[Path, ObservedGraph]],
        open_session: OpenSession,
        others: Sessions,
    ) -> None:
        self.backend = others.backend
        self.precision = others.precision
        self._bundle = bundle
        self._observed = observed
        self._open = open_session
        self._others = others
        self._sessions: dict[str, _ObservingSession] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Opens a graph for these sizes, instead of others; an observed graph takes one prompt at a time."""
        if graph not in self._observed:
            self._others.open(graph, dimensions)
            return
        path, observed = self._observed[graph]
        record, sizes = self._bundle.graph(graph), {**dimensions, **ONE_PROMPT}
        shapes = {item.name: resolve_shape(item.shape, sizes) for item in record.inputs}
        if graph not in self._sessions or self._sessions[graph].shapes != shapes:
            self._sessions.pop(graph, None)  # frees its memory before the next is opened
            record = record.model_copy(update={"outputs": (*record.outputs, observed.output)})
            self._sessions[graph] = _ObservingSession(self._open(path, record, shapes), observed, shapes)

    def session(self, graph: str) -> Session:
        """Returns the session of an opened graph."""
        return self._sessions[graph] if graph in self._sessions else self._others.session(graph)

    def close(self) -> None:
        """Frees all sessions."""
        self._sessions.clear()
        self._others.close()


class _ObservingSession:
    def __init__(self, session: Session, observed: ObservedGraph, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._session = session
        self._observed = observed

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        *outputs, channels = self._session.run(feeds)
        self._observed.see(channels)
        return outputs


def observe_samples(
    bundle: Bundle,
    folder: Path,
    models: Mapping[str, Callable[[], ir.Model]],
    others: Sessions,
    open_session: OpenSession = open_on_onnxruntime,
    sizes: Collection[ClipSize] | None = None,
    means: bool = False,
) -> dict[str, dict[str, Statistics]]:
    """Runs the sample requests; returns what came into each matrix layer, by graph and layer.

    Args:
        bundle: the bundle.
        folder: holds the observed graphs while the requests run.
        models: makes each graph to observe, portable or typed. If a decoder is among them, frames are decoded too.
        others: run the other graphs; they are closed.
        open_session: opens the observed graphs.
        sizes: of the clips; None takes small, short ones, and those of `example_requests.sample_size`.
        means: whether to observe the means of channels, too; each input is then read twice.
    """
    observed = {}
    for graph, make in models.items():
        path, model = folder / f"{graph}.observed.onnx", make()
        observed[graph] = (path, ObservedGraph(model, means))
        write_typed(model, path)
        del model
        gc.collect()  # reference cycles keep the graph's weights mapped: gigabytes
    sessions = ObservingSessions(bundle, observed, open_session, others)
    decodes = not set(DECODERS.values()).isdisjoint(models)
    try:
        for size in sizes or (small_size(bundle), sample_size(bundle)):
            run_samples(bundle, sessions, size, _ignore if decodes else None)
    finally:
        sessions.close()
        for path, _ in observed.values():
            path.unlink(missing_ok=True)
            path.with_suffix(".weights").unlink(missing_ok=True)
    return {graph: seen.statistics() for graph, (_, seen) in observed.items()}


def depends_on(bundle: Bundle) -> dict[str, object]:
    """What the statistics depend on, for `SetBuild.made_with`: the requests run through all graphs."""
    return {"requests": [graph_checksums(bundle.manifest, graph) for graph in bundle.manifest.graphs]}


def _ignore(frames: Array) -> None:
    """Takes the frames of a clip, which only had to be decoded."""
