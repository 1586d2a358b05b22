"""The seam between the loop on the host and what runs the graphs: one session per graph."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]


class Session(Protocol):
    """One graph, ready to run."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in its order."""


class Sessions(Protocol):
    """Opens the graphs of a bundle."""

    backend: str
    precision: str

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Makes a graph ready for inputs of these sizes, by the names of the manifest's symbolic dimensions."""

    def session(self, graph: str) -> Session:
        """The session of a graph that was opened."""

    def close(self) -> None:
        """Frees all sessions."""
