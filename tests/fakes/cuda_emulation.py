"""Emulated CUDA calls on host memory, recorded, with graphs that replay and faults on demand."""

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Any

from cuda.bindings import runtime as cudart

from .cuda_streams import EmulatedStreams, EventRecord, Work

SUCCESS = cudart.cudaError_t.cudaSuccess
INVALID_CAPTURE = cudart.cudaError_t.cudaErrorStreamCaptureInvalidated


class EmulatedCudart:
    """Replaces `cuda.bindings.runtime`; a call that the real module lacks raises AttributeError.

    Work runs only when the host waits for it, or when memory is freed, which waits for the device.

    Attributes:
        calls: the names of all calls, in order.
        fault: index of the call that fails, and the status it returns.
        limit: bytes of device memory.
        graph_bytes: device memory that each executable graph takes.
        distort: changes the work of a graph when its capture ends.
        streams: the queues of work, and the events.
        capture: the work that a capture has recorded; None if there is none.
    """

    def __init__(self, limit: int = 1 << 34) -> None:
        self.calls: list[str] = []
        self.fault: tuple[int, Any] | None = None
        self.limit = limit
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.graph_bytes = 0
        self.distort: Callable[[list[Work]], list[Work]] = list
        self.graphs: dict[int, list[Work]] = {}
        self.executable: set[int] = set()
        self.streams = EmulatedStreams()
        self.capture: list[Work] | None = None
        self.broken_capture = False
        self._captured_stream = 0
        self._handles = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(cudart, name)
        if not name.startswith("cuda") or not callable(real) or isinstance(real, type):
            return real
        emulated = getattr(type(self), f"_{name}")

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if self.fault is not None and len(self.calls) - 1 == self.fault[0]:
                self.broken_capture = self.capture is not None
                if name == "cudaStreamEndCapture":
                    self.capture = None
                return (self.fault[1], *[None] * 3)
            result = emulated(self, *args)
            return result if isinstance(result, tuple) else (SUCCESS, result)

        return call

    def submit(self, work: Work, stream: int) -> None:
        """Enqueues work on a stream, or records it if the stream is being captured."""
        if self.capture is None or stream != self._captured_stream:
            self.streams.enqueue(stream, [work])
        else:
            self.capture.append(work)

    @property
    def used(self) -> int:
        """Bytes of allocated device memory."""
        return sum(ctypes.sizeof(buffer) for buffer in self.memory.values()) + len(self.executable) * self.graph_bytes

    @property
    def leaked(self) -> list[Any]:
        """Everything allocated or created and not released yet, except for streams."""
        return [*self.memory, *self.pinned, *self.graphs, *self.streams.events]

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _cudaSetDevice(self, device: int) -> tuple[Any]:
        return (SUCCESS,)

    def _cudaGetLastError(self) -> tuple[Any]:
        return (SUCCESS,)

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == cudart.cudaStreamNonBlocking
        handle = self._handle()
        self.streams.queues[handle] = deque()
        return handle

    def _cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        del self.streams.queues[stream]
        return (SUCCESS,)

    def _cudaMemGetInfo(self) -> tuple[Any, int, int]:
        return SUCCESS, self.limit - self.used, self.limit

    def _take(self, pool: dict[int, Any], nbytes: int) -> int:
        assert self.capture is None, "memory cannot be allocated during a capture"
        buffer = (ctypes.c_byte * (nbytes + 256))()
        ctypes.memset(buffer, 0xA5, nbytes + 256)  # a device does not clear memory
        address = -(-ctypes.addressof(buffer) // 256) * 256
        pool[address] = buffer
        return address

    def _cudaMalloc(self, nbytes: int) -> tuple[Any, int | None]:
        assert nbytes > 0
        if self.used + nbytes > self.limit:
            return cudart.cudaError_t.cudaErrorMemoryAllocation, None
        return SUCCESS, self._take(self.memory, nbytes)

    def _cudaFree(self, address: int) -> tuple[Any]:
        self.streams.wait_for_device()
        del self.memory[address]
        return (SUCCESS,)

    def _cudaHostAlloc(self, nbytes: int, flags: int) -> int:
        return self._take(self.pinned, nbytes)

    def _cudaFreeHost(self, address: int) -> tuple[Any]:
        self.streams.wait_for_device()
        del self.pinned[address]
        return (SUCCESS,)

    def check_range(self, address: int, nbytes: int) -> None:
        """Fails if the range is not inside allocated memory."""
        pools = (*self.memory.items(), *self.pinned.items())
        inside = any(start <= address and address + nbytes <= start + ctypes.sizeof(buffer) for start, buffer in pools)
        assert inside, "memory was never allocated, or was freed"

    def _cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> tuple[Any]:
        on_device = {"Host": False, "Device": True}
        source_kind, target_kind = kind.name.removeprefix("cudaMemcpy").split("To")
        for address, side in ((source, source_kind), (target, target_kind)):
            pool = self.memory if on_device[side] else self.pinned
            assert any(start <= address < start + ctypes.sizeof(buffer) for start, buffer in pool.items()), kind.name

        def work() -> None:
            self.check_range(source, nbytes)
            self.check_range(target, nbytes)
            ctypes.memmove(target, source, nbytes)

        self.submit(work, stream)
        return (SUCCESS,)

    def _cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Any]:
        self.check_range(address, nbytes)
        self.submit(lambda: ctypes.memset(address, value, nbytes), stream)
        return (SUCCESS,)

    def _cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert self.capture is None, "a stream cannot be synchronized during its capture"
        self.streams.wait_for_stream(stream)
        return (SUCCESS,)

    def _cudaEventCreateWithFlags(self, flags: int) -> int:
        handle = self._handle()
        self.streams.events[handle] = -1.0
        return handle

    def _cudaEventDestroy(self, event: int) -> tuple[Any]:
        del self.streams.events[event]
        return (SUCCESS,)

    def _cudaEventRecordWithFlags(self, event: int, stream: int, flags: int) -> tuple[Any]:
        external = flags == cudart.cudaEventRecordExternal
        assert external == (self.capture is not None), (
            "only an external event in a capture can be waited for after a replay"
        )
        self.submit(EventRecord(self.streams, event), stream)
        return (SUCCESS,)

    def _cudaEventSynchronize(self, event: int) -> tuple[Any]:
        self.streams.wait_for_event(event)
        return (SUCCESS,)

    def _cudaEventElapsedTime(self, start: int, end: int) -> float:
        events = self.streams.events
        assert 0 < events[start] < events[end]
        return events[end] - events[start]

    def _cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        assert self.capture is None
        self.capture, self._captured_stream, self.broken_capture = [], stream, False
        return (SUCCESS,)

    def _cudaStreamEndCapture(self, stream: int) -> tuple[Any, Any]:
        assert self.capture is not None
        assert stream == self._captured_stream
        recorded, self.capture = self.capture, None
        if self.broken_capture:
            return INVALID_CAPTURE, None
        handle = self._handle()
        self.graphs[handle] = self.distort(recorded)
        return SUCCESS, handle

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int | None]:
        assert flags == 0
        if self.used + self.graph_bytes > self.limit:
            return cudart.cudaError_t.cudaErrorMemoryAllocation, None
        handle = self._handle()
        self.graphs[handle] = self.graphs[graph]
        self.executable.add(handle)
        return SUCCESS, handle

    def _cudaGraphUpload(self, graph: int, stream: int) -> tuple[Any]:
        return (SUCCESS,)

    def _cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any]:
        assert graph in self.executable
        self.streams.enqueue(stream, self.graphs[graph], launched=True)
        return (SUCCESS,)

    def _cudaGraphDestroy(self, graph: int) -> tuple[Any]:
        del self.graphs[graph]
        return (SUCCESS,)

    def _cudaGraphExecDestroy(self, graph: int) -> tuple[Any]:
        self.executable.remove(graph)
        return self._cudaGraphDestroy(graph)
