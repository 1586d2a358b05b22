"""The CUDA runtime calls that the loop needs, on one stream. Each result is checked."""

import ctypes
from importlib import import_module
from typing import Any

from ..errors import BackendError, DeviceLost, DeviceOutOfMemory
from ..operating_system import CUDA_DRIVER

NO_DRIVER = "no NVIDIA driver was found; install one"
_OUT_OF_MEMORY = 2
_LOST = frozenset((4, 46, 100, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 911, 999))
"""Errors in `cudaError_t` after which the process's context is unusable."""


class Cuda:
    """One stream of device 0, and the calls on it.

    Args:
        api: `cuda.bindings.runtime`, or a fake.

    Raises:
        BackendError: by every method, if the call fails.
    """

    def __init__(self, api: Any = None) -> None:
        self._api = api = api or runtime_api()
        self._call("cudaSetDevice", 0)
        (stream,) = self._call("cudaStreamCreateWithFlags", api.cudaStreamNonBlocking)
        self._stream = stream
        self.stream = int(stream)
        self.capturing = False

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Allocates device memory; returns its address."""
        (pointer,) = self._call("cudaMalloc", nbytes)
        return int(pointer)

    def free(self, address: int) -> None:
        """Frees device memory."""
        self._call("cudaFree", address)

    def allocate_host(self, nbytes: int) -> int:
        """Allocates page-locked host memory; returns its address."""
        (pointer,) = self._call("cudaHostAlloc", nbytes, self._api.cudaHostAllocDefault)
        return int(pointer)

    def free_host(self, address: int) -> None:
        """Frees page-locked memory."""
        self._call("cudaFreeHost", address)

    def copy_in(self, device: int, host: int, nbytes: int) -> None:
        """Copies from host to device."""
        self._copy(device, host, nbytes, self._api.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def copy_out(self, host: int, device: int, nbytes: int) -> None:
        """Copies from device to host."""
        self._copy(host, device, nbytes, self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copies from device to device."""
        self._copy(target, source, nbytes, self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Sets each byte of device memory."""
        self._call("cudaMemsetAsync", address, byte, nbytes, self._stream)

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        self._call("cudaStreamSynchronize", self._stream)

    def event(self) -> Any:
        """A new event that records the time."""
        (event,) = self._call("cudaEventCreateWithFlags", self._api.cudaEventDefault)
        return event

    def record(self, event: Any) -> None:
        """Records an event on the stream; within a graph, each replay records it again."""
        flags = self._api.cudaEventRecordExternal if self.capturing else self._api.cudaEventRecordDefault
        self._call("cudaEventRecordWithFlags", event, self._stream, flags)

    def wait(self, event: Any) -> None:
        """Blocks until the stream has passed an event."""
        self._call("cudaEventSynchronize", event)

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two events."""
        (milliseconds,) = self._call("cudaEventElapsedTime", start, end)
        return float(milliseconds) / 1000

    def free_event(self, event: Any) -> None:
        """Destroys an event."""
        self._call("cudaEventDestroy", event)

    def begin_capture(self) -> None:
        """Begins a capture: work on the stream is recorded instead of run."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        self.capturing = True

    def end_capture(self) -> Any:
        """Ends a capture, even one that failed; returns the graph of the recorded work."""
        self.capturing = False
        (graph,) = self._call("cudaStreamEndCapture", self._stream)
        return graph

    def instantiate(self, graph: Any) -> Any:
        """Makes a graph executable and uploads it; destroys the graph itself."""
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self.discard(graph)
        try:
            self._call("cudaGraphUpload", executable, self._stream)
        except BackendError:
            self.free_graph(executable)
            raise
        return executable

    def discard(self, graph: Any) -> None:
        """Destroys a captured graph; `free_graph` destroys executable ones."""
        self._call("cudaGraphDestroy", graph)

    def launch(self, executable: Any) -> None:
        """Launches an executable graph."""
        self._call("cudaGraphLaunch", executable, self._stream)

    def free_graph(self, executable: Any) -> None:
        """Destroys an executable graph."""
        self._call("cudaGraphExecDestroy", executable)

    def clear_error(self) -> None:
        """Clears CUDA's last error, if it is one that can be cleared."""
        self._api.cudaGetLastError()

    def close(self) -> None:
        """Destroys the stream."""
        self._call("cudaStreamDestroy", self._stream)

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, self._stream)

    def _call(self, name: str, *args: Any) -> tuple[Any, ...]:
        status, *results = getattr(self._api, name)(*args)
        if int(status) == 0:
            return tuple(results)
        text = f"{name} failed with {getattr(status, 'name', status)} ({int(status)})"
        if int(status) == _OUT_OF_MEMORY:
            raise DeviceOutOfMemory("backend", f"the device is out of memory: {text}")
        if int(status) in _LOST:
            raise DeviceLost("backend", f"the device was lost: {text}", "load the pipeline again")
        raise BackendError("backend", text)


def runtime_api() -> Any:
    """`cuda.bindings.runtime`.

    Raises:
        BackendError: it is not installed, or there is no driver.
    """
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError:
        missing = "cuda-bindings is missing; run: pip install cuda-bindings"
        raise BackendError("backend", missing if has_driver() else NO_DRIVER) from None


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded."""
    try:
        ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return False
    return True
