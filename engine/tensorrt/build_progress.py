"""Reports the progress of a build, and stops it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...runtime.format.build_options import OnBuildProgress


class BuildControl:
    """State shared by a build's monitor and the thread that waits for the build.

    Attributes:
        stopped: set by Ctrl-C, or if the caller's callback failed.
        error: what the callback raised. A callback of the library must not raise, so it is raised later.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raises the error that ended the build; called once the library has returned."""
        if self.error is not None:
            raise self.error
        if self.stopped.is_set():
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[BuildControl]:
    """Makes Ctrl-C within the block stop the build at its next step."""
    control = BuildControl()
    if threading.current_thread() is not threading.main_thread():
        yield control
        return
    before = signal.signal(signal.SIGINT, lambda *_: control.stopped.set())
    try:
        yield control
    finally:
        signal.signal(signal.SIGINT, before)


def make_progress_monitor(trt: Any, report: OnBuildProgress, control: BuildControl) -> Any:
    """Makes a TensorRT progress monitor. It reports phases, never backwards, and ends the build if it is stopped."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self._open: list[tuple[str, int, int]] = []  # nested phases: name, steps done, steps
            self._furthest = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._open.append((phase_name, 0, max(1, num_steps)))
            self._report()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._open = [(name, step + 1 if name == phase_name else done, steps) for name, done, steps in self._open]
            self._report()
            return not control.stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._open = [phase for phase in self._open if phase[0] != phase_name]

        def _report(self) -> None:
            fraction, share = 0.0, 1.0
            for _, done, steps in self._open:
                fraction += share * min(done, steps) / steps
                share /= steps
            self._furthest = max(self._furthest, min(fraction, 1.0))  # phases come one after another within a step
            try:
                report(self._open[-1][0].lower() if self._open else "building", self._furthest)
            except BaseException as error:
                control.error = control.error or error
                control.stopped.set()

    return Monitor()
