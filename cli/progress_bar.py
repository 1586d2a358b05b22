"""The progress bar of the commands that take long."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Bar:
    """A bar on stderr that appears with the first unit of work: what is refused before that shows none."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=1.0)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def update(self, description: str, fraction: float) -> None:
        """Shows what is being done and how much of all is behind it, 0..1."""
        self._progress.start()
        self._progress.update(self._task, description=description, completed=fraction)
