"""The seam between the loop on the device and what runs the graphs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ..format.bundle import Bundle
from ..format.engine_keys import ClipSize
from ..format.weights import WeightTable
from .cuda import Cuda


class Engine(Protocol):
    """One graph of static shapes on the device."""

    @property
    def activation_bytes(self) -> int:
        """Memory that a run needs besides inputs and outputs; engines never run at once and share it."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """numpy's name of the type of each input and output; bfloat16 for that."""

    @property
    def capturable(self) -> bool:
        """Whether a run can go into a CUDA graph of the loop's; asked outside of a capture."""

    def use_activation(self, address: int, nbytes: int) -> None:
        """Gives the engine its activation memory."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Puts a run on the stream, with inputs and outputs at these device addresses.

        Raises:
            BackendError: the engine cannot run.
        """

    def refit(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        """Puts other weights, as `read` gives them, in the place of the named ones.

        Raises:
            BackendError: the engine was not built for it.
        """

    def close(self) -> None:
        """Frees the engine."""


class Loader(Protocol):
    """Opens the engines of a backend."""

    backend: str

    @property
    def precision(self) -> str | None:
        """Of its engines; None where the first that was built is taken."""

    def check(self, bundle: Bundle, size: ClipSize) -> None:
        """Raises BackendError where the engines for a size are not there."""

    def open(
        self, bundle: Bundle, graph: str, size: ClipSize, shapes: Mapping[str, tuple[int, ...]], cuda: Cuda
    ) -> Engine:
        """The engine of a graph, whose inputs and outputs have these shapes.

        Raises:
            BackendError: there is none for this size, or it must not be loaded here.
        """

    def check_refit(self, bundle: Bundle) -> None:
        """Raises BackendError where no engines of a bundle can be refitted."""

    def weight_table(self, bundle: Bundle, graph: str, size: ClipSize) -> WeightTable:
        """Where the weights of an engine lie; empty where it cannot be refitted."""
