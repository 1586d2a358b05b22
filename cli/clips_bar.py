"""The progress bar of many clips: how many, how fast, and the time left."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..batch.request_lines import Job


class _Rate(TextColumn):
    """Clips per second or, if they are fewer, per minute."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The rate since the start."""
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        return Text(f"{rate:.1f} clips/s" if rate >= 1 else f"{rate * 60:.1f} clips/min")


class ClipsBar:
    """A bar on stderr, from the first clip on that is being made.

    Args:
        total: clips of the batch, if known. Those that are there already are taken off it as they are found.
    """

    def __init__(self, total: int | None) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, speed_estimate_period=600)
        self._task = self._progress.add_task("", total=total)
        self._total = total
        self._ended = 0
        self._running: dict[str, float] = {}

    def __enter__(self) -> "ClipsBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def on_fraction(self, job: Job, fraction: float) -> None:
        """Shows a part of a clip that is being made."""
        self._progress.start()
        self._running[job.id] = fraction
        self._show()

    def on_end(self, job: Job) -> None:
        """Counts a clip that was made or failed."""
        self._running.pop(job.id, None)
        self._ended += 1
        self._show()

    def on_kept(self, _: Job) -> None:
        """Subtracts a clip that exists already from the total."""
        if self._total is not None:
            self._total -= 1
            self._show()

    def _show(self) -> None:
        running = sum(tuple(self._running.values()))  # a copy, since another thread may add one
        self._progress.update(self._task, completed=self._ended + running, total=self._total)
