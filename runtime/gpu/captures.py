"""CUDA graphs of the variants of a request: each is captured once and then replayed."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..errors import BackendError, DeviceLost, DeviceOutOfMemory
from .cuda import Cuda
from .program import Variant

_logger = logging.getLogger("sparsectrl_lcm")

MAX_GRAPHS = 8
"""Graphs to keep; the least recently used is dropped first."""


class GraphCache:
    """Captured graphs by variant. A graph fixes addresses, so call `clear` when memory moves or weights change."""

    def __init__(self, cuda: Cuda, limit: int = MAX_GRAPHS) -> None:
        self._cuda = cuda
        self._limit = limit
        self._graphs: OrderedDict[Variant, Any] = OrderedDict()
        self.enabled = True

    def replay(self, variant: Variant) -> bool:
        """Launches the graph of a variant; returns False if there is none."""
        if variant not in self._graphs:
            return False
        self._graphs.move_to_end(variant)
        self._cuda.launch(self._graphs[variant])
        return True

    def capture(self, variant: Variant, enqueue: Callable[[], None]) -> None:
        """Captures what `enqueue` puts on the stream; `enqueue` must have run once outside of a capture.

        If the capture fails, logs a warning once, and later requests are enqueued without a graph. If memory runs out,
        drops all graphs; the next request tries again.
        """
        if not self.enabled or variant in self._graphs:
            return
        while len(self._graphs) >= self._limit:
            _, oldest = self._graphs.popitem(last=False)
            self._cuda.free_graph(oldest)
        try:
            self._graphs[variant] = self._capture(enqueue)
        except DeviceLost:
            raise
        except DeviceOutOfMemory:  # there may be room another time
            self._cuda.clear_error()
            self.clear()
        except BackendError as error:
            self.enabled = False
            self._cuda.clear_error()
            _logger.warning("no CUDA graph could be captured, requests are enqueued one engine at a time: %s", error)

    def _capture(self, enqueue: Callable[[], None]) -> Any:
        self._cuda.begin_capture()
        try:
            enqueue()
        except BaseException:
            with suppress(BackendError):  # the failure may have ended the capture
                self._cuda.discard(self._cuda.end_capture())
            raise
        return self._cuda.instantiate(self._cuda.end_capture())

    def clear(self) -> None:
        """Destroys all graphs."""
        while self._graphs:
            _, graph = self._graphs.popitem()
            self._cuda.free_graph(graph)
