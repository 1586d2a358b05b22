"""Calibrates int8: records the largest input magnitude of each matrix layer during real requests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.cpu.openvino import OpenVinoSession, compile_options
from ..runtime.cpu.sessions import Array, Session, Sessions
from ..runtime.format.bundle import Bundle
from ..runtime.format.clip_layout import ONE_PROMPT
from ..runtime.format.manifest import TensorRecord, resolve_shape
from .check import LARGEST, observe_largest
from .rewrites.quantization import quantizable


class ObservedGraph:
    """A typed graph with one more output: the largest input magnitude of each of its matrix layers.

    Args:
        model: the typed graph; it is changed in place.
    """

    def __init__(self, model: ir.Model) -> None:
        layers = quantizable(model)
        self.sources = list(dict.fromkeys(str(node.inputs[0].name) for node in layers if node.inputs[0] is not None))
        self._layers = {str(node.name): str(node.inputs[0].name) for node in layers if node.inputs[0] is not None}
        values = {str(node.inputs[0].name): node.inputs[0] for node in layers if node.inputs[0] is not None}
        observe_largest(model.graph, [values[name] for name in self.sources])
        self._seen = np.zeros(len(self.sources), np.float32)

    def see(self, largest: Array) -> None:
        """Adds the magnitudes of one run, [N] for each prompt."""
        self._seen = np.maximum(self._seen, largest.reshape(-1, len(self.sources)).max(axis=0))

    def ranges(self) -> dict[str, float]:
        """Returns the largest magnitude so far for each layer name, without layers that did not run."""
        by_source = dict(zip(self.sources, map(float, self._seen), strict=True))
        return {layer: by_source[source] for layer, source in self._layers.items() if by_source[source] > 0}


class ObservingSessions:
    """Runs the observed graphs on OpenVINO, and the other graphs of a bundle through other sessions.

    Args:
        bundle: the bundle.
        observed: for each graph name, the file of the observed graph and the graph.
        others: the sessions of the graphs that are not observed.
        precision: of the observed graphs.
    """

    def __init__(
        self, bundle: Bundle, observed: Mapping[str, tuple[Path, ObservedGraph]], others: Sessions, precision: str
    ) -> None:
        self.backend = others.backend
        self.precision = precision
        self._bundle = bundle
        self._observed = observed
        self._others = others
        self._sessions: dict[str, _ObservingSession] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Compiles a graph for these sizes; an observed graph takes one prompt at a time."""
        if graph not in self._observed:
            self._others.open(graph, dimensions)
        elif graph not in self._sessions:
            path, observed = self._observed[graph]
            record = self._bundle.graph(graph)
            shapes = {item.name: resolve_shape(item.shape, {**dimensions, **ONE_PROMPT}) for item in record.inputs}
            seen = TensorRecord(name=LARGEST, dtype="float32", shape=(len(observed.sources),))
            record = record.model_copy(update={"outputs": (*record.outputs, seen)})
            session = OpenVinoSession(path, record, shapes, "CPU", compile_options("CPU", self.precision))
            self._sessions[graph] = _ObservingSession(session, observed)

    def session(self, graph: str) -> Session:
        """Returns the session of an opened graph."""
        return self._sessions[graph] if graph in self._sessions else self._others.session(graph)

    def close(self) -> None:
        """Frees all sessions."""
        self._sessions.clear()
        self._others.close()


class _ObservingSession:
    def __init__(self, session: OpenVinoSession, observed: ObservedGraph) -> None:
        self._session = session
        self._observed = observed

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        *outputs, largest = self._session.run(feeds)
        self._observed.see(largest)
        return outputs
