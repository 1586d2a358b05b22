"""How far a build is, and how it is stopped."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...runtime.format.build_options import OnBuildProgress


class BuildControl:
    """What a build's monitor and the thread that waits for it tell each other.

    Attributes:
        stopped: set by Ctrl-C, or where the caller's callback has failed.
        error: what the callback raised; nothing may be raised within a callback of the library.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raises what ended the build, once the library has returned."""
        if self.error is not None:
            raise self.error
        if self.stopped.is_set():
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[BuildControl]:
    """Within the block Ctrl-C stops the build at its next step."""
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
    """A TensorRT progress monitor that reports a build's phases, never backwards, and ends it when it is stopped."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self._open: list[tuple[str, int, int]] = []  # nested phases: name, steps done, steps
            self._furthest = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._open.append((phase_name, 0, max(1, num_steps)))
            self._tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._open = [(name, step + 1 if name == phase_name else done, steps) for name, done, steps in self._open]
            self._tell()
            return not control.stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._open = [phase for phase in self._open if phase[0] != phase_name]

        def _tell(self) -> None:
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
