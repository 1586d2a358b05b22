"""The interface between the loop on the host and the libraries that run the graphs: one session per graph."""

from collections.abc import Iterator, Mapping
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


def split_feeds(feeds: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Array]]:
    """The feeds of each run of a graph that takes these shapes, if there are several prompts or parts of a clip.

    Args:
        feeds: inputs by name. Each is in its shape, several times that long, or shorter: then it is in every run.
        shapes: the input shapes of one run.
    """
    rows = {name: len(array) // shapes[name][0] for name, array in feeds.items() if array.ndim}
    runs = max(1, *rows.values())
    for index in range(runs):
        yield {
            name: array[index * shapes[name][0] :][: shapes[name][0]] if runs > 1 and rows[name] == runs else array
            for name, array in feeds.items()
        }
