"""Conditioning on the device: prompt embeddings and residuals of the current request and of earlier ones."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

from ..errors import DeviceOutOfMemory
from .buffers import aligned
from .cuda import Cuda


class ConditioningArea:
    """A block of device memory that the engines write and read, and copies of the conditionings that it held before.

    The CUDA graphs hold the area's addresses, so a conditioning that is used again is copied back into it. It is
    copied out only when another one is about to replace it: the next seed of a request costs nothing.

    Args:
        cuda: the stream.
        max_bytes: limit for the area and the copies together; the area alone may exceed it.
        moved: called when the area moves to another address.
    """

    def __init__(self, cuda: Cuda, max_bytes: int, moved: Callable[[], None]) -> None:
        self._cuda = cuda
        self._max_bytes = max_bytes
        self._moved = moved
        self._current: Hashable | None = None
        self._used = 0
        self._copies: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
        self.address = 0
        self.nbytes = 0

    def recall(self, key: Hashable) -> bool:
        """Brings a kept conditioning into the area; returns False if there is none for `key`."""
        if key == self._current:
            return True
        if key not in self._copies:
            return False
        address, nbytes = self._copies.pop(key)
        try:
            self._keep_current()
            self._cuda.copy(self.address, address, nbytes)
        finally:
            self._cuda.synchronize()
            self._cuda.free(address)
        self._current, self._used = key, nbytes
        return True

    def reserve(self, nbytes: int) -> None:
        """Makes room for a conditioning of `nbytes` that is about to be computed; the area holds none until `hold`."""
        self._keep_current()
        if nbytes <= self.nbytes:
            return
        self._moved()
        if self.nbytes:
            self._cuda.synchronize()
            self._cuda.free(self.address)
            self.address = self.nbytes = 0
        self._shrink_to(self._max_bytes - nbytes)
        self.address = self._cuda.allocate(aligned(nbytes))
        self.nbytes = aligned(nbytes)

    def hold(self, key: Hashable, nbytes: int) -> None:
        """Records the key and the size of the conditioning in the area."""
        self._current, self._used = key, nbytes

    def forget(self) -> None:
        """Drops all conditionings; the area keeps its memory."""
        self._current = None
        self._shrink_to(0)

    def close(self) -> None:
        """Frees everything."""
        self.forget()
        if self.nbytes:
            self._cuda.free(self.address)
        self.address = self.nbytes = 0

    def _keep_current(self) -> None:
        """Copies the current conditioning out, if it fits."""
        key, self._current = self._current, None
        if key is None or self._used > self._max_bytes - self.nbytes:
            return
        address = self._room()
        if not address:
            return
        try:
            self._cuda.copy(address, self.address, self._used)
        except BaseException:
            self._cuda.free(address)
            raise
        self._copies[key] = (address, self._used)

    def _room(self) -> int:
        """Memory for a copy of the current conditioning; the oldest copy's if the sizes agree. 0 if there is none."""
        limit = self._max_bytes - self.nbytes - self._used
        if self._copies and sum(used for _, used in self._copies.values()) > limit:
            key, (address, used) = next(iter(self._copies.items()))
            if used == self._used:
                del self._copies[key]
                return address
        self._shrink_to(limit)
        try:
            return self._cuda.allocate(self._used)
        except DeviceOutOfMemory:  # the conditioning can be computed again
            self._cuda.clear_error()
            return 0

    def _shrink_to(self, nbytes: int) -> None:
        """Frees the oldest copies until the rest takes at most `nbytes`."""
        while self._copies and sum(used for _, used in self._copies.values()) > nbytes:
            _, (address, _) = self._copies.popitem(last=False)
            self._cuda.free(address)
