"""Where torch computes: on the loop's CUDA stream, or on the host for an emulated device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from sparsectrl_lcm.runtime.errors import BackendError, DeviceOutOfMemory, first_line
from sparsectrl_lcm.runtime.gpu.buffers import host_array
from sparsectrl_lcm.runtime.gpu.cuda import Cuda

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_RAW = {"bfloat16": "int16"}
"""Types that numpy lacks, by one of the same width."""

Work = Callable[[], None]


class Stream(Protocol):
    """Runs work in order, and sees the loop's memory as tensors."""

    device: torch.device

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The memory at an address as a tensor, without a copy."""

    def prepare(self, work: Work) -> None:
        """Runs work whose tensors outlive it, such as weights. Never within a capture."""

    def submit(self, work: Work) -> None:
        """Enqueues work. Its tensors are dead when it has run, except for those of the loop."""

    def release(self) -> None:
        """Gives memory back that no engine needs."""


NEEDED = (
    "_cuda_beginAllocateCurrentThreadToPool",
    "_cuda_endAllocateToPool",
    "_cuda_releasePool",
    "_cuda_clearCublasWorkspaces",
)
"""Names of torch._C that `CudaStream` calls; none is documented."""


def missing_name() -> str | None:
    """A name that `CudaStream` needs and this torch lacks; None if it has all."""
    return next((name for name in NEEDED if not hasattr(torch._C, name)), None)


class CudaStream:
    """The loop's CUDA stream.

    A captured graph fixes the addresses of torch's intermediate tensors, so they come from a pool that lives until
    `release`. Nothing on one stream overlaps, so that plain runs and all graphs share the pool.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.device = torch.device("cuda", 0)
        self._stream = torch.cuda.ExternalStream(cuda.stream, device=self.device)
        self._pool: Any = None
        self._tensors: dict[tuple[int, tuple[int, ...], str], torch.Tensor] = {}

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The memory at an address as a tensor. Kept, since a capture runs with the addresses of the plain run."""
        key = (address, shape, dtype)
        if key not in self._tensors:
            raw = torch.as_tensor(_DeviceArray(address, shape, _RAW.get(dtype, dtype)), device=self.device)
            self._tensors[key] = raw.view(DTYPES[dtype])
        return self._tensors[key]

    def prepare(self, work: Work) -> None:
        """Runs work on the stream, with torch's usual memory."""
        self._run(work, nullcontext())

    def submit(self, work: Work) -> None:
        """Enqueues work on the stream, with memory of the pool."""
        self._pool = self._pool or torch.cuda.MemPool()
        self._run(work, self._memory_of(self._pool))

    def release(self) -> None:
        """Frees the pool and all memory that torch keeps for later. Nothing may run on the stream."""
        self._tensors.clear()
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS's workspace for this stream lies in the pool
        self._pool = None
        torch.cuda.empty_cache()

    @contextmanager
    def _memory_of(self, pool: Any) -> Iterator[None]:
        """Lets this thread allocate from the pool.

        torch.cuda.use_mem_pool does the same, but on a capturing stream releases of torch after 2.13 ask for the graph
        of torch that is being captured. The loop captures with CUDA itself, so there is none.
        """
        torch._C._cuda_beginAllocateCurrentThreadToPool(self.device.index, pool.id)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(self.device.index, pool.id)
            torch._C._cuda_releasePool(self.device.index, pool.id)

    def _run(self, work: Work, memory: Any) -> None:
        try:
            with torch.cuda.stream(self._stream), memory, torch.inference_mode():
                work()
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory("backend", f"the device is out of memory: {first_line(error)}") from error
        except RuntimeError as error:
            if isinstance(error, BackendError):
                raise
            raise BackendError("backend", f"torch failed: {first_line(error)}") from error


class HostStream:
    """The host in the role of a device.

    Args:
        cudart: an emulation with `submit(work, stream)` and `check_range(address, nbytes)`.
        stream: the loop's stream.
    """

    def __init__(self, cudart: Any, stream: int) -> None:
        self.device = torch.device("cpu")
        self._cudart = cudart
        self._stream = stream

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The memory at an address as a tensor."""
        array = host_array(address, shape, _RAW.get(dtype, dtype))
        self._cudart.check_range(address, array.nbytes)
        return torch.from_numpy(array).view(DTYPES[dtype])

    def prepare(self, work: Work) -> None:
        """Runs work after what is on the stream."""
        self._cudart.streams.wait_for_stream(self._stream)
        with torch.inference_mode():
            work()

    def submit(self, work: Work) -> None:
        """Enqueues work, or records it for each replay of the graph that is being captured."""

        def run() -> None:
            with torch.inference_mode():
                work()

        self._cudart.submit(run, self._stream)

    def release(self) -> None:
        """Does nothing: Python frees the host's memory."""


class _DeviceArray:
    """Device memory as other libraries describe it to each other."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "strides": None,
            "version": 2,
        }
