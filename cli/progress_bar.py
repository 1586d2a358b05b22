"""The progress bar of long commands."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from ..runtime.progress import Progress as ClipProgress


class Bar:
    """A bar on stderr. It appears with the first update, so an error before that shows no bar."""

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
        """Shows the current step and the fraction of the work that is done, 0 to 1."""
        self._progress.start()
        self._progress.update(self._task, description=description, completed=fraction)

    def of_clip(self, done: "ClipProgress") -> None:
        """Shows the progress of a single clip."""
        self.update(f"{done.stage} {done.step}/{done.steps}", done.fraction)

    def of_many(self, clips: int) -> Callable[[int, "ClipProgress"], None]:
        """The `on_progress` of `VideoPipeline.generate_many` for so many clips."""

        def show(position: int, done: "ClipProgress") -> None:
            self.update(
                f"clip {position + 1}/{clips}, {done.stage} {done.step}/{done.steps}",
                (position + done.fraction) / clips,
            )

        return show
