"""The graphs that run in this process, and how another thread ends them: libraries look for this between two nodes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import Cancelled


class GraphRuns:
    """Runs of graphs under way. Each change of the set is a single operation, so there is no lock."""

    def __init__(self) -> None:
        self._cancels: set[Callable[[], None]] = set()
        self.stopped = False

    @contextmanager
    def cancellable(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Makes `stop` end the run in the block with `cancel`, which other threads call, perhaps several times.

        Raises:
            Cancelled: `stop` was called before the run or during it.
        """
        self._cancels.add(cancel)  # before the check: `stop` is seen, or sees this
        if self.stopped:
            self._cancels.discard(cancel)
            raise Cancelled("", "stopped before a graph ran")
        try:
            yield
        except Exception as error:
            if not self.stopped:
                raise
            raise Cancelled("", "stopped while a graph ran") from error
        finally:
            self._cancels.discard(cancel)

    def stop(self) -> None:
        """Ends the runs under way and refuses others until `resume`.

        A run that is just about to begin may be missed by its library: call this again until all have ended.
        """
        self.stopped = True
        for cancel in list(self._cancels):
            with suppress(RuntimeError):
                cancel()

    def resume(self) -> None:
        """Allows runs again."""
        self.stopped = False


RUNS = GraphRuns()
"""Those of all pipelines in this process."""
