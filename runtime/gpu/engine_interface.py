"""The interface between the loop on the device and the libraries that run the graphs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ..format.bundle import Bundle
from ..format.clip_layout import ClipSize
from ..format.weights import WeightTable
from .cuda import Cuda


class Engine(Protocol):
    """One graph with static shapes on the device."""

    @property
    def activation_bytes(self) -> int:
        """Bytes that a run needs besides inputs and outputs. Engines share them, since they never run at once."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The type of each input and output, by its numpy name or as bfloat16."""

    @property
    def capturable(self) -> bool:
        """Whether a run can be captured into the loop's CUDA graph; read outside of a capture."""

    def use_activation(self, address: int, nbytes: int) -> None:
        """Sets the engine's activation memory."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Enqueues a run on the stream, with inputs and outputs at these device addresses.

        Raises:
            BackendError: the engine cannot run.
        """

    def refit(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        """Replaces the named weights with those that `read` returns.

        Raises:
            BackendError: the engine was built without refit.
        """

    def close(self) -> None:
        """Frees the engine."""


class Loader(Protocol):
    """Opens the engines of a backend."""

    backend: str

    @property
    def precision(self) -> str | None:
        """The precision of its engines; None takes the first that was built."""

    def keyframe_slots(self, bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        """The number of keyframes that the engines for a size take, at least `keyframes`.

        Raises:
            BackendError: the engines are missing.
            InvalidRequest: the engines take fewer keyframes.
        """

    def open(
        self, bundle: Bundle, graph: str, size: ClipSize, shapes: Mapping[str, tuple[int, ...]], cuda: Cuda
    ) -> Engine:
        """Opens the engine of a graph; `shapes` are those of its inputs and outputs.

        Raises:
            BackendError: there is none for this size, or it must not be loaded here.
        """

    def check_refit(self, bundle: Bundle) -> None:
        """Raises BackendError if no engine of a bundle can be refitted."""

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        """The weights of an engine; empty if it cannot be refitted."""
