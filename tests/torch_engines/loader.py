"""torch as a loader of engines, which follows `Loader` in runtime/gpu/engine_interface.py."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph, weight_table
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.cuda import Cuda

from .fusions import fuse
from .programs import Program, compile_graph, dtype_of
from .streams import DTYPES, CudaStream, Stream

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled graph, without weights.

    Attributes:
        program: its calls.
        table: its weights in the bundle.
        types: the types in which the calls take the weights.
        dtypes: of its inputs and outputs, as engines name them.
    """

    program: Program
    table: WeightTable
    types: dict[str, torch.dtype]
    dtypes: dict[str, str]


_compiled: dict[Hashable, Compiled] = {}
"""Compiled graphs of this process: tests open the same ones many times."""


class TorchLoader:
    """Opens the typed graphs that `build` makes for TensorRT, and runs them with torch.

    Args:
        precision: fp16, bf16 or fp32.
        stream: makes the stream that torch computes on.
        refit: whether the engines take other weights.
        channels_last: whether the weights of convolutions, and so their results, keep channels last.
    """

    backend = "torch"

    def __init__(
        self,
        precision: str = "fp16",
        stream: Callable[[Cuda], Stream] = CudaStream,
        refit: bool = False,
        channels_last: bool = True,
    ) -> None:
        self.precision = precision
        self._make_stream = stream
        self._refit = refit
        self._channels_last = channels_last
        self._streams: dict[int, Stream] = {}
        self._tables: dict[str, WeightTable] = {}
        self._open = 0

    def keyframe_slots(self, bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        """As many as wanted: nothing has to be built."""
        return max(bundle.manifest.keyframe_slots, keyframes)

    def open(
        self, bundle: Bundle, graph: str, size: ClipSize, shapes: Mapping[str, tuple[int, ...]], cuda: Cuda
    ) -> "TorchEngine":
        """Compiles a graph and reads its weights."""
        if cuda.stream not in self._streams:
            self._streams[cuda.stream] = self._make_stream(cuda)
        compiled = _compile(bundle, graph, self.precision, shapes)
        self._tables[graph] = compiled.table
        engine = TorchEngine(compiled, self._streams[cuda.stream], shapes, self._closed)
        self._open += 1
        try:
            engine.load(lambda name: _read(bundle, compiled.table, name), self._channels_last)
        except BaseException:
            engine.close()
            raise
        return engine

    def check_refit(self, bundle: Bundle) -> None:
        """Raises BackendError unless the loader was made for it."""
        if not self._refit:
            raise BackendError("refit", "these engines take no other weights", "load with refit")

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        """The weights of an engine, also before it is opened."""
        if not self._refit:
            return WeightTable({})
        return self._tables.get(graph) or weight_table(bundle, graph, typed_graph(bundle, graph, self.precision))

    def _closed(self, stream: Stream) -> None:
        self._open -= 1
        if not self._open:
            stream.release()


class TorchEngine:
    """One graph with static shapes."""

    activation_bytes = 0  # torch allocates its own
    capturable = True

    def __init__(
        self,
        compiled: Compiled,
        stream: Stream,
        shapes: Mapping[str, tuple[int, ...]],
        closed: Callable[[Stream], None],
    ) -> None:
        self.dtypes = compiled.dtypes
        self.program = compiled.program
        self._types = compiled.types
        self._stream = stream
        self._shapes = shapes
        self._closed = closed
        self._inputs = [name for name in self.dtypes if name not in self.program.outputs]
        self._tensors: dict[str, torch.Tensor] = {}

    def load(self, read: Callable[[str], Any], channels_last: bool) -> None:
        """Copies weights and constants to the device.

        The host rounds and orders the weights. On the device torch would keep the memory of what it rounded.
        """

        def work() -> None:
            for name, constant in self.program.constants.items():
                self._tensors[name] = constant if constant.ndim == 0 else constant.to(self._stream.device)
            for name in self.program.weights:
                weight = torch.from_numpy(read(name)).to(self._types[name])
                image = channels_last and weight.ndim == 4
                weight = weight.contiguous(memory_format=torch.channels_last if image else torch.contiguous_format)
                self._tensors[name] = weight.to(self._stream.device)

        self._stream.prepare(work)

    def use_activation(self, address: int, nbytes: int) -> None:
        """Does nothing: torch allocates its own activation memory."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Enqueues a run on the stream."""
        places = dict(addresses)

        def tensor(name: str) -> torch.Tensor:
            return self._stream.tensor(places[name], self._shapes[name], self.dtypes[name])

        def work() -> None:
            inputs = {name: tensor(name) for name in self._inputs}
            self.program.run({**self._tensors, **inputs}, {name: tensor(name) for name in self.program.outputs})

        self._stream.submit(work)

    def refit(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        """Copies other weights over those on the device; captured graphs read them, too."""

        def work() -> None:
            for name in names:
                values = torch.from_numpy(np.array(read(name)))  # a copy: files are mapped read-only
                half = values.dtype == torch.uint16  # bfloat16 in numpy
                self._tensors[name].copy_(values.view(torch.bfloat16) if half else values)

        self._stream.prepare(work)

    def close(self) -> None:
        """Frees the weights."""
        self._tensors.clear()
        self._closed(self._stream)


def _compile(bundle: Bundle, graph: str, precision: str, shapes: Mapping[str, tuple[int, ...]]) -> Compiled:
    record = bundle.graph(graph)
    inputs = {item.name: shapes[item.name] for item in record.inputs}
    key = (graph, bundle.manifest.files[record.path].sha256, precision, tuple(inputs.items()))
    if key not in _compiled:
        model = typed_graph(bundle, graph, precision)
        table = weight_table(bundle, graph, model)
        narrowed = fuse(model)
        types = {
            name: PRECISIONS[precision if name in narrowed else weight.precision]
            for name, weight in table.root.items()
            if name in model.graph.initializers
        }
        dtypes = {str(value.name): _NAMES[dtype_of(value)] for value in (*model.graph.inputs, *model.graph.outputs)}
        _compiled[key] = Compiled(compile_graph(model, inputs, types), table, types, dtypes)
    return _compiled[key]


def _read(bundle: Bundle, table: WeightTable, name: str) -> Any:
    """A weight in fp32, mapped from its file."""
    record = table.root[name]
    count = int(np.prod(record.shape, dtype=np.int64))
    values = np.memmap(bundle.folder / record.path, np.float32, "c", record.offset, (count,))
    return np.asarray(values).reshape(record.shape)
