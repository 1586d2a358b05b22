"""CUDA graphs of the last variants of a request: captured once, replayed from then on."""

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
"""Graphs that are kept; the least recently used goes first."""


class GraphCache:
    """Captured graphs by variant. A graph freezes addresses, so `clear` it when memory moves or weights change."""

    def __init__(self, cuda: Cuda, limit: int = MAX_GRAPHS) -> None:
        self._cuda = cuda
        self._limit = limit
        self._graphs: OrderedDict[Variant, Any] = OrderedDict()
        self.enabled = True

    def replay(self, variant: Variant) -> bool:
        """Launches the graph of a variant; False where there is none."""
        if variant not in self._graphs:
            return False
        self._graphs.move_to_end(variant)
        self._cuda.launch(self._graphs[variant])
        return True

    def capture(self, variant: Variant, enqueue: Callable[[], None]) -> None:
        """Captures what `enqueue` puts on the stream, after it has run once outside of a capture.

        Where that fails, requests are enqueued plainly from then on, which one warning says.
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
        except DeviceOutOfMemory:  # another time there may be room
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
            with suppress(BackendError):  # of the capture that the failure has ended
                self._cuda.discard(self._cuda.end_capture())
            raise
        return self._cuda.instantiate(self._cuda.end_capture())

    def clear(self) -> None:
        """Destroys all graphs."""
        while self._graphs:
            _, graph = self._graphs.popitem()
            self._cuda.free_graph(graph)
