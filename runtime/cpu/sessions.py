"""The interface between the loop on the host and the libraries that run the graphs: one session per graph."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]


class Session(Protocol):
    """One graph, ready to run."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the graph; returns its outputs in order."""


class Sessions(Protocol):
    """Opens the graphs of a bundle."""

    backend: str
    precision: str

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        """Prepares a graph for inputs of these sizes, by name of the manifest's symbolic dimensions."""

    def session(self, graph: str) -> Session:
        """The session of an open graph."""

    def close(self) -> None:
        """Frees all sessions."""
