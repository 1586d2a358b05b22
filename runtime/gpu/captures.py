"""CUDA graphs of the variants of a request: captured once, compared with a plain run, and then replayed."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError, DeviceLost, DeviceOutOfMemory
from .cuda import Cuda
from .program import Variant

_logger = logging.getLogger("sparsectrl_lcm")

MAX_GRAPHS = 8
"""Variants whose graphs are kept; those of the least recently used are dropped first."""
MORE_MEMORY = 2 << 20
"""Bytes; a capture that ran out of memory is tried again when this much more is free. CUDA allocates in such blocks."""
PROOFS = 2
"""A variant is proved after its capture. It is proved once more after the next capture of another variant, which uses
the same engines: their captures might overwrite what earlier graphs read (NVIDIA/TensorRT#3798)."""

Between = Callable[[range], None]
"""Called between two parts of a request, with the noise that the second part needs."""


@dataclass(slots=True)
class Graphs:
    """The graphs of a variant.

    Attributes:
        parts: for each part of a request, the noise that it needs and its executable graph.
        proofs: number of proofs passed.
        captures: captures that had been tried, of any variant, at the last proof.
    """

    parts: list[tuple[range, Any]]
    proofs: int = 0
    captures: int = 0


class GraphCache:
    """Captured graphs by variant. A graph fixes addresses, so call `clear` when memory moves or weights change."""

    def __init__(self, cuda: Cuda, limit: int = MAX_GRAPHS) -> None:
        self._cuda = cuda
        self._limit = limit
        self._graphs: OrderedDict[Variant, Graphs] = OrderedDict()
        self._captures = 0
        self._given_up: set[Variant] = set()
        self._free_bytes: dict[Variant, int] = {}
        self.enabled = True

    def replay(self, variant: Variant, between: Between) -> bool:
        """Launches the graphs of a variant. Returns False if there are none, or if they have to be proved first."""
        if variant not in self._graphs:
            return False
        self._graphs.move_to_end(variant)
        graphs = self._graphs[variant]
        if graphs.proofs < PROOFS and graphs.captures < self._captures:
            return False
        self._launch(graphs, between)
        return True

    def wants(self, variant: Variant) -> bool:
        """Whether a variant that `replay` did not launch should be captured or proved now."""
        if not self.enabled or variant in self._given_up:
            return False
        needed = self._free_bytes.get(variant, 0)
        return needed == 0 or self._cuda.memory()[0] >= needed

    def capture(
        self, variant: Variant, enqueue: Callable[[Between], None], prove: Callable[[Callable[[], None]], str]
    ) -> None:
        """Captures a variant, if that was not done, and proves its graphs.

        If a capture fails, requests of all variants are enqueued without graphs from then on. If a replay gives other
        frames, only this variant is given up, since each is proved by itself. Both log one warning. If memory runs out,
        the variant is tried again once more memory is free than was left then.

        Args:
            variant: the variant of the request that has just run without graphs.
            enqueue: enqueues its work.
            prove: calls its argument, which launches the graphs; returns how the frames differ, "" if they do not.
        """
        try:
            if variant not in self._graphs:
                while len(self._graphs) >= self._limit:
                    self._drop(next(iter(self._graphs)))
                self._captures += 1
                self._graphs[variant] = Graphs(self._capture(enqueue))
                self._free_bytes.pop(variant, None)
            graphs = self._graphs[variant]
            difference = prove(lambda: self._launch(graphs))
        except DeviceLost:
            raise
        except DeviceOutOfMemory:
            self._cuda.clear_error()
            self._drop(variant)
            self._free_bytes[variant] = self._cuda.memory()[0] + MORE_MEMORY
        except BackendError as error:
            self._cuda.clear_error()
            self.clear()
            self.enabled = False
            _logger.warning("CUDA graphs failed, requests are enqueued one engine at a time: %s", error)
        else:
            self._judge(variant, graphs, difference)

    def _judge(self, variant: Variant, graphs: Graphs, difference: str) -> None:
        if not difference:
            graphs.proofs += 1
            graphs.captures = self._captures
            return
        self._drop(variant)
        self._given_up.add(variant)
        _logger.warning(
            "a replayed CUDA graph gave other frames than its engines did (%s); requests of this kind are enqueued "
            "one engine at a time: %s",
            difference,
            variant,
        )

    def _launch(self, graphs: Graphs, between: Between | None = None) -> None:
        for index, (noise, graph) in enumerate(graphs.parts):
            if index and between is not None:
                between(noise)
            self._cuda.launch(graph)

    def _capture(self, enqueue: Callable[[Between], None]) -> list[tuple[range, Any]]:
        """Captures each part into a graph of its own."""
        parts: list[tuple[range, Any]] = []
        begun = [range(0)]

        def end() -> None:
            parts.append((begun[-1], self._cuda.instantiate(self._cuda.end_capture())))

        def between(noise: range) -> None:
            end()
            self._cuda.begin_capture()
            begun.append(noise)

        self._cuda.begin_capture()
        try:
            enqueue(between)
            end()
        except BaseException:
            with suppress(BackendError):  # the failure may have ended the capture
                if self._cuda.capturing:
                    self._cuda.discard(self._cuda.end_capture())
            self._free(parts)
            raise
        return parts

    def _drop(self, variant: Variant) -> None:
        """Destroys the graphs of a variant, if there are any."""
        if variant in self._graphs:
            self._free(self._graphs.pop(variant).parts)

    def _free(self, parts: list[tuple[range, Any]]) -> None:
        for _, graph in parts:
            with suppress(BackendError):
                self._cuda.free_graph(graph)

    def clear(self) -> None:
        """Destroys all graphs. What was given up stays given up."""
        while self._graphs:
            self._drop(next(iter(self._graphs)))
