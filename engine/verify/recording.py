"""Records the inputs of all graphs while sample requests run on the portable graphs."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ...runtime.backends import REFERENCE
from ...runtime.cpu.sessions import Array, split_feeds
from ...runtime.errors import InvalidRequest
from ...runtime.example_requests import run_samples
from ...runtime.format.bundle import Bundle
from ...runtime.format.clip_layout import engine_layout
from ...runtime.format.decoders import DECODERS
from ...runtime.format.engine_sets import EngineSet
from ..check import onnxruntime_errors, open_portable
from .header import CLIP, PORTABLE
from .saved_results import SavedResults


def with_slots_of(engines: EngineSet | None, bundle: Bundle, loaded: SavedResults | None) -> Bundle:
    """The bundle with as many keyframe slots as static engines have; others take the inputs as they were recorded.

    Raises:
        InvalidRequest: the loaded results were recorded for another number.
    """
    if engines is None or engines.index.size is None:
        return bundle
    slots, recorded = engines.check_keyframes(bundle.manifest, 0), bundle.manifest.keyframe_slots
    if loaded is not None and slots != recorded:
        reason = f"the results are of {recorded} keyframes, the engines take {slots}"
        raise InvalidRequest("load", reason, "leave --load out")
    return bundle.with_keyframe_slots(slots)


def record(bundle: Bundle, results: SavedResults, graphs: Collection[str], clips: bool) -> None:
    """Runs the sample requests on ONNX Runtime, and saves what goes into each graph at each step.

    The inputs have the shapes of engines for the size, so that every backend takes them: one prompt, all keyframe
    slots, and as many frames as an engine decodes at a time.

    Args:
        bundle: the bundle.
        results: where to save.
        graphs: the graphs to record.
        clips: whether to save the frames of the clips too.
    """
    sessions = RecordingSessions(bundle, results, graphs)
    made = 0

    def keep(frames: Array) -> None:
        nonlocal made
        results.write_outputs(CLIP, PORTABLE, made, {"frames": frames})
        made += 1

    try:
        run_samples(bundle, sessions, results.header.size, keep if clips else None)
        sessions.end_clip()
    finally:
        sessions.close()
    results.update(runs={**sessions.runs, **({CLIP: made} if clips else {})})


class RecordingSessions:
    """The portable graphs on ONNX Runtime. Saves the inputs of their runs."""

    backend = REFERENCE
    precision = "fp32"

    def __init__(self, bundle: Bundle, results: SavedResults, graphs: Collection[str]) -> None:
        self.runs = dict.fromkeys(graphs, 0)
        self._bundle = bundle
        self._results = results
        self._layout = engine_layout(bundle.manifest, results.header.size)
        self._sessions: dict[str, Any] = {}
        self._images: Array | None = None

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Opens a graph for any size."""
        if graph == "unet":  # the first graph that a request opens
            self.end_clip()
        if graph not in self._sessions:
            with onnxruntime_errors(graph):
                self._sessions[graph] = open_portable(self._bundle.folder / self._bundle.graph(graph).path)

    def session(self, graph: str) -> "_RecordingSession":
        """The session of an open graph."""
        return _RecordingSession(self, graph, self._sessions[graph])

    def close(self) -> None:
        """Frees all sessions."""
        self._sessions.clear()

    def ran(self, graph: str, feeds: Mapping[str, Array], outputs: list[Array]) -> None:
        """Saves the inputs of a run, one prompt at a time."""
        if graph == "lcm_update":
            self._images = outputs[1]  # [F, 4, H/8, W/8]
        if graph not in DECODERS.values():
            self._save(graph, feeds)

    def end_clip(self) -> None:
        """Saves the inputs of all decoders: the images of the last step, in the parts that an engine takes."""
        images, self._images = self._images, None
        if images is not None:
            for graph in self.runs.keys() & set(DECODERS.values()):
                self._save(graph, {"latents": images})

    def _save(self, graph: str, feeds: Mapping[str, Array]) -> None:
        if graph not in self.runs:
            return
        record = self._bundle.graph(graph)
        shapes = self._layout.shapes(graph, record)
        dtypes = {item.name: item.dtype for item in record.inputs}
        for part in split_feeds(feeds, shapes):
            fitted = {name: fit(array, shapes[name]).astype(dtypes[name]) for name, array in part.items()}
            self._results.write_inputs(graph, self.runs[graph], fitted)
            self.runs[graph] += 1


class _RecordingSession:
    def __init__(self, sessions: RecordingSessions, graph: str, session: Any) -> None:
        self._sessions = sessions
        self._graph = graph
        self._session = session

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        with onnxruntime_errors(self._graph):
            outputs: list[Array] = self._session.run(None, dict(feeds))
        self._sessions.ran(self._graph, feeds, outputs)
        return outputs


def fit(array: Array, shape: tuple[int, ...]) -> Array:
    """Brings an input of a request to the shape of an engine: repeats single values, or fills with zeros.

    Zeros are right for keyframe slots that a request leaves empty: their mask is zero.
    """
    if all(have in (1, want) for have, want in zip(array.shape, shape, strict=True)):
        return np.broadcast_to(array, shape)
    return np.pad(array, [(0, want - have) for have, want in zip(array.shape, shape, strict=True)])
