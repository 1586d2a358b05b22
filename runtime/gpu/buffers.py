"""Named device memory, allocated once per clip size and used by every request."""

import ctypes
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from ..format.clip_layout import ADDRESS_ALIGNMENT
from ..format.weights import convert
from .cuda import Cuda

BFLOAT16 = "bfloat16"
_PRECISIONS = {"float16": "fp16", BFLOAT16: "bf16"}


def host_type(dtype: str) -> str:
    """The numpy type that holds values of a type: uint16 for bfloat16, which numpy lacks."""
    return "uint16" if dtype == BFLOAT16 else dtype


def item_bytes(dtype: str) -> int:
    """Bytes of one value of a type, given by its numpy name or as bfloat16."""
    return np.dtype(host_type(dtype)).itemsize


def to_type(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values as an array of a type; float16 and bfloat16 are rounded from float32."""
    return convert(values, _PRECISIONS[dtype]) if dtype in _PRECISIONS else values


def from_type(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A copy of an array of a type that numpy can compute with: bfloat16 as float32."""
    if dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.copy()


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up, so that the next array begins at an address that engines accept."""
    return -(-nbytes // ADDRESS_ALIGNMENT) * ADDRESS_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Tensor:
    """Part of a block of memory: `count` arrays of `shape`, each aligned."""

    offset: int
    shape: tuple[int, ...]
    dtype: str
    count: int = 1

    @property
    def stride(self) -> int:
        """Bytes from one array to the next."""
        return aligned(self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of one array."""
        return prod(self.shape) * item_bytes(self.dtype)


class Block:
    """Named tensors, one after the other in one piece of memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.nbytes = 0
        self.address = 0

    def add(self, name: str, shape: tuple[int, ...], dtype: str, count: int = 1) -> None:
        """Reserves room for `count` arrays."""
        tensor = Tensor(self.nbytes, shape, dtype, count)
        self.tensors[name] = tensor
        self.nbytes += tensor.stride * count

    def at(self, name: str, index: int = 0) -> int:
        """The address of an array."""
        tensor = self.tensors[name]
        return self.address + tensor.offset + index * tensor.stride


class Inputs:
    """The inputs of a request: a block of page-locked host memory and a block of the same layout on the device."""

    def __init__(self, cuda: Cuda, block: Block) -> None:
        self._cuda = cuda
        self.block = block
        self.host = cuda.allocate_host(block.nbytes)
        try:
            block.address = cuda.allocate(block.nbytes)
        except BackendError:
            cuda.free_host(self.host)
            raise

    def array(self, name: str, index: int = 0) -> NDArray[Any]:
        """The host's array, for writing."""
        tensor = self.block.tensors[name]
        return host_array(self.host + tensor.offset + index * tensor.stride, tensor.shape, tensor.dtype)

    def copy_in(self, first: str, last: str, last_index: int, first_index: int = 0) -> None:
        """Copies everything from array `first_index` of `first` through array `last_index` of `last` to the device."""
        start, end = self.at(first, first_index) - self.block.address, self.block.tensors[last]
        nbytes = end.offset + last_index * end.stride + end.nbytes - start
        self._cuda.copy_in(self.block.address + start, self.host + start, nbytes)

    def copy_out(self, name: str) -> None:
        """Copies the first array of a name back to the host."""
        offset = self.block.tensors[name].offset
        self._cuda.copy_out(self.host + offset, self.at(name), self.block.tensors[name].nbytes)

    def close(self) -> None:
        """Frees both blocks."""
        self._cuda.free(self.block.address)
        self._cuda.free_host(self.host)

    def at(self, name: str, index: int = 0) -> int:
        """The device address of an array."""
        return self.block.at(name, index)


def host_array(address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """A view of page-locked memory as an array."""
    buffer = (ctypes.c_byte * (prod(shape) * item_bytes(dtype))).from_address(address)
    array: NDArray[Any] = np.ctypeslib.as_array(buffer).view(host_type(dtype)).reshape(shape)
    return array
