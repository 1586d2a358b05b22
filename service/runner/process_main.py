"""The program of the runner's process: loads the pipeline, then makes one clip after the other.

`python -m sparsectrl_lcm.service.runner.process_main FD` exchanges lines of JSON over the socket FD. It receives one
`load`, then `make` (the next one only after the answer) and `cancel`. It sends `ready`; for each job `step` and
`preview`, and at the end `made` or `failed`; and `ended` if only a new process can go on. `ended` has a `refusal` if no
process can. The output of libraries goes to the server's log.
"""

import base64
import faulthandler
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...runtime import (
    Cancelled,
    DeviceLost,
    DeviceOutOfMemory,
    InvalidRequest,
    Keyframe,
    Progress,
    SparseCtrlLcmError,
)
from ...runtime.disk_errors import is_disk_full
from ...runtime.errors import first_line, message
from ...runtime.images import RESAMPLES, fit, load_picture
from ...runtime.output.recording import Recording
from .interface import REFUSALS, JobFailed
from .picture_main import open_image

FPS = 8
PREVIEW_SIDE = 256


class Reports(Protocol):
    """Where a job's messages go, and where its cancellation comes from."""

    cancelled: Event

    def say(self, what: str, **values: Any) -> None:
        """Sends a message."""


class Channel:
    """This process's end of the socket. A thread receives what the server sends."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)
        self.orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.cancelled = Event()
        Thread(target=self._listen, name="listener", daemon=True).start()

    def say(self, what: str, **values: Any) -> None:
        """Sends a message."""
        try:
            self._socket.sendall(json.dumps({"say": what, **values}).encode() + b"\n")
        except OSError:
            os._exit(1)  # the server is gone

    def _listen(self) -> None:
        with suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                order = json.loads(line)
                if order["do"] == "cancel":
                    self.cancelled.set()
                else:
                    self.cancelled.clear()  # a late cancellation was for the previous job
                    self.orders.put(order)
        os._exit(1)


class Jobs:
    """Makes clips with a pipeline and reports to the server.

    Args:
        pipeline: a `VideoPipeline`, or an object with its `generate`, `backend`, `precision` and `bundle`.
        channel: gets the reports.
        image_pixels: pixels of the largest keyframe.
    """

    def __init__(self, pipeline: Any, channel: Reports, image_pixels: int) -> None:
        self._pipeline = pipeline
        self._channel = channel
        self._image_pixels = image_pixels
        self._sizes = pipeline.bundle.manifest.sizes

    def make(self, options: dict[str, Any], keyframes: list[tuple[int, str]], output: str) -> None:
        """Makes one clip and reports the result or the failure.

        Raises:
            DeviceLost: the device can only be used again by a new process.
        """
        try:
            self._make(options, keyframes, output)
        except DeviceLost:
            raise
        except Exception as error:  # after any error, the next job may succeed
            failure = failure_of(error, options)
            if failure.kind in ("failed", "out_of_memory"):
                traceback.print_exc()
            says = {"kind": failure.kind, "message": failure.message}
            self._channel.say("failed", **says, field=failure.field, keyframe=failure.keyframe)

    def _make(self, options: dict[str, Any], keyframes: list[tuple[int, str]], output: str) -> None:
        start = time.perf_counter()
        resample = options.get("resample", RESAMPLES[0])
        pictures = [
            Keyframe(index, self._read(Path(path), place, resample)) for place, (index, path) in enumerate(keyframes)
        ]
        with Recording(output, FPS) as recording:

            def on_frames(first: int, frames: NDArray[np.uint8]) -> None:
                recording.add(first, frames)
                self._channel.say("preview", index=first, jpeg=base64.b64encode(preview(frames[0])).decode())

            clip = self._pipeline.generate(
                **options, keyframes=pictures, on_progress=self._on_progress, on_frames=on_frames
            )
            recording.save(clip)
        timings = {stage: float(seconds) for stage, seconds in clip.timings.items()}
        self._channel.say("made", seed=int(clip.seed), seconds=time.perf_counter() - start, timings=timings)

    def _on_progress(self, progress: Progress) -> bool:
        done = {"step": progress.step, "steps": progress.steps, "fraction": progress.fraction}
        self._channel.say("step", stage=progress.stage, **done)
        return not self._channel.cancelled.is_set()

    def _read(self, path: Path, place: int, resample: str) -> NDArray[np.uint8]:
        """Reads a keyframe and resizes it to the clip's size [H, W, 3]. Frees the large original at once."""
        with path.open("rb") as file:
            try:
                picture = open_image(file, self._image_pixels)
                return fit(load_picture(picture, "image"), self._sizes.width, self._sizes.height, resample)
            except InvalidRequest as error:
                raise JobFailed("invalid", str(error), keyframe=place) from None


def about(pipeline: Any) -> dict[str, Any]:
    """Returns what `Runner.about` returns."""
    sizes = pipeline.bundle.manifest.sizes
    return {
        "backend": pipeline.backend,
        "precision": pipeline.precision,
        "width": sizes.width,
        "height": sizes.height,
        "frames": sizes.frames,
        "fps": FPS,
        "bundle": str(pipeline.bundle.folder),
        "pid": os.getpid(),
    }


def preview(frame: NDArray[np.uint8]) -> bytes:
    """Returns a small JPEG of a frame [H, W, 3]."""
    image = Image.fromarray(frame)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=80)
    return jpeg.getvalue()


def failure_of(error: Exception, options: dict[str, Any]) -> JobFailed:
    """Returns the failure that the server gets for an exception; `options` are the job's keywords."""
    if isinstance(error, JobFailed):
        return error
    if isinstance(error, InvalidRequest):
        if error.field in options:
            return JobFailed("invalid", message("", error.reason, error.remedy), field=error.field)
        return JobFailed("invalid", str(error))
    if isinstance(error, Cancelled):
        return JobFailed("cancelled", first_line(error))
    if isinstance(error, DeviceOutOfMemory | MemoryError):
        return JobFailed("out_of_memory", first_line(error))
    return JobFailed("disk_full" if is_disk_full(error) else "failed", first_line(error))


def refusal_of(error: Exception) -> dict[str, str] | None:
    """Describes an error in the options, which every process would meet; returns None for other errors.

    Returns:
        kind (a name in `REFUSALS`), field, reason and remedy.
    """
    if isinstance(error, DeviceLost | DeviceOutOfMemory):
        return None  # the next attempt may succeed
    for kind, known in REFUSALS.items():
        if isinstance(error, known):
            return {"kind": kind, "field": error.field, "reason": error.reason, "remedy": error.remedy}
    return None


def load(pipeline: str, options: dict[str, Any]) -> Any:
    """Calls the `module:callable` with the options and returns its result."""
    module, _, names = pipeline.partition(":")
    make: Any = import_module(module)
    for name in names.split("."):
        make = getattr(make, name)
    return make(**options)


def live_and_die_with_the_server() -> None:
    """Ties this process to the server: it ignores the signals of the process group and ends when the server dies."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group, but the server drains first
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, ctypes.c_ulong(signal.SIGKILL))
    with suppress(OSError):  # if memory runs out, the system should kill this process, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Makes clips until the server or the device is lost."""
    if sys.platform == "win32":
        raise RuntimeError("the service needs Linux or macOS")
    faulthandler.enable()
    live_and_die_with_the_server()
    channel = Channel(int(sys.argv[1]))
    setup = channel.orders.get()
    os.nice(setup["nice"])
    try:
        pipeline = load(setup["pipeline"], setup["options"])
        jobs = Jobs(pipeline, channel, setup["image_pixels"])
        channel.say("ready", about=about(pipeline))
    except Exception as error:
        if not isinstance(error, SparseCtrlLcmError):
            traceback.print_exc()
        return channel.say("ended", message=f"could not load: {first_line(error)}", refusal=refusal_of(error))
    while True:
        order = channel.orders.get()
        try:
            jobs.make(order["options"], order["keyframes"], order["output"])
        except DeviceLost as error:
            traceback.print_exc()
            return channel.say("ended", message=f"lost its device: {first_line(error)}", refusal=None)


if __name__ == "__main__":
    main()
    os._exit(1)  # skips exit handlers, which may wait for a device that is gone
