"""Polygraphy's runners of one graph: the portable graph, and the engine as requests run it."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from ...runtime.backend_interface import OpenGraph
from ...runtime.cpu.sessions import Array
from ...runtime.errors import BackendError, reason_of
from ...runtime.format.bundle import Bundle
from ...runtime.format.manifest import GraphRecord
from ..check import onnxruntime_errors, open_portable
from .header import PORTABLE, RUNTIME
from .interruptions import check_stopped
from .saved_results import SavedResults, cut


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Polygraphy from printing, and turns its errors into one line."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except PolygraphyException as error:
        raise BackendError("verify", f"Polygraphy: {cut(reason_of(error))}") from error


def portable_runner(bundle: Bundle, graph: str) -> OnnxrtRunner:
    """The portable graph on ONNX Runtime's CPU provider, without optimisations."""
    record = bundle.graph(graph)
    path = bundle.folder / record.path

    def session() -> Any:
        opened = open_portable(path)
        return _OneImage(opened) if _takes_images(record) else opened

    return OnnxrtRunner(session, name=PORTABLE)


class RuntimeRunner(BaseRunner):
    """A graph of an executor, opened as requests open it."""

    def __init__(self, open_graph: Callable[[], OpenGraph], record: GraphRecord) -> None:
        super().__init__(name=RUNTIME)
        self._open_graph = open_graph
        self._record = record
        self._graph: OpenGraph | None = None

    def activate_impl(self) -> None:
        """Opens the graph."""
        self._graph = self._open_graph()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and symbolic shapes of the inputs."""
        metadata = TensorMetadata()
        for item in self._record.inputs:
            metadata.add(item.name, np.dtype(item.dtype), item.shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> "OrderedDict[str, Array]":
        """Runs the graph; returns its outputs by name."""
        assert self._graph is not None
        start = time.perf_counter()
        outputs = self._graph.run(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict(zip([item.name for item in self._record.outputs], outputs, strict=True))

    def deactivate_impl(self) -> None:
        """Closes the graph."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()


def run(runner: BaseRunner, results: SavedResults, graph: str) -> None:
    """Runs a graph on all recorded inputs and saves the outputs.

    Raises:
        BackendError: the graph cannot be opened or run, or its inputs cannot be read.
    """
    with quiet(), onnxruntime_errors(graph), runner:
        types = {name: item.dtype.numpy() for name, item in runner.get_input_metadata(use_numpy_dtypes=False).items()}
        for index in range(results.header.runs[graph]):
            saved = results.inputs(graph, index, types)
            outputs = runner.infer({name: array.astype(types[name]) for name, array in saved.items()})
            check_stopped()
            results.write_outputs(graph, runner.name, index, outputs, runner.last_inference_time())


def _takes_images(record: GraphRecord) -> bool:
    """Whether every row of the inputs is an image of its own, as in the VAE."""
    return all(item.shape[:1] == ("images",) for item in record.inputs)


class _OneImage:
    """A session that runs image by image, which bounds the memory of the VAE."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.get_inputs = session.get_inputs
        self.get_outputs = session.get_outputs

    def run(self, names: Any, feeds: Mapping[str, Array]) -> list[Array]:
        count = len(next(iter(feeds.values())))
        parts = [
            self._session.run(names, {name: array[index : index + 1] for name, array in feeds.items()})
            for index in range(count)
        ]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
