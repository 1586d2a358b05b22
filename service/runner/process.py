"""The program of the runner's process: loads the pipeline, then makes one clip after the other.

`python -m sparsectrl_lcm.service.runner.process FD` talks lines of JSON over the socket FD. It hears one `load`, then
`make` (the next only after the answer) and `cancel`. It says `ready`; for each job `step` and `preview`, and at the end
`made` or `failed`; and `ended` where only a new process can help, `refused` where that cannot either. What libraries
print goes to the server's log.
"""

import base64
import faulthandler
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...runtime import (
    BackendError,
    BundleError,
    Cancelled,
    DeviceLost,
    DeviceOutOfMemory,
    InvalidRequest,
    Keyframe,
    Progress,
    SparseCtrlLcmError,
)
from ...runtime.errors import first_line
from ...runtime.images import fit, load_picture
from ...runtime.output.writers import Recording
from .jobs import JobFailed

FPS = 8
PREVIEW_SIDE = 256
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "BMP")
"""What keyframes may be; Pillow knows more, some of which runs other programs."""


class Channel:
    """The child's end of the socket; a thread hears what the server says."""

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
                    self.cancelled.clear()  # a cancellation that came too late was for the job before
                    self.orders.put(order)
        os._exit(1)


class Jobs:
    """Makes clips with a pipeline and tells of it.

    Args:
        pipeline: a `VideoPipeline`, or what has its `generate`, `backend`, `precision` and `bundle`.
        image_pixels: of the largest keyframe.
    """

    def __init__(self, pipeline: Any, channel: Channel, image_pixels: int) -> None:
        self._pipeline = pipeline
        self._channel = channel
        self._image_pixels = image_pixels
        self._sizes = pipeline.bundle.manifest.sizes

    def about(self) -> dict[str, Any]:
        """What `Runner.about` says."""
        return {
            "backend": self._pipeline.backend,
            "precision": self._pipeline.precision,
            "width": self._sizes.width,
            "height": self._sizes.height,
            "frames": self._sizes.frames,
            "fps": FPS,
            "bundle": str(self._pipeline.bundle.folder),
            "pid": os.getpid(),
        }

    def make(self, options: dict[str, Any], keyframes: list[tuple[int, str]], output: str) -> None:
        """Makes one clip and says how it went.

        Raises:
            DeviceLost: only a new process can help.
        """
        try:
            self._make(options, keyframes, output)
        except DeviceLost:
            raise
        except Exception as error:  # whatever it is, the next job may fare better
            failure = failure_of(error, options)
            if failure.kind in ("failed", "out_of_memory"):
                traceback.print_exc()
            says = {"kind": failure.kind, "message": failure.message}
            self._channel.say("failed", **says, field=failure.field, keyframe=failure.keyframe)

    def _make(self, options: dict[str, Any], keyframes: list[tuple[int, str]], output: str) -> None:
        start = time.perf_counter()
        pictures = [Keyframe(index, self._read(Path(path), place)) for place, (index, path) in enumerate(keyframes)]
        with tempfile.TemporaryDirectory() as folder, Recording(Path(folder) / "clip.mp4", FPS) as recording:

            def on_frames(first: int, frames: NDArray[np.uint8]) -> None:
                recording.add(first, frames)
                self._channel.say("preview", index=first, jpeg=base64.b64encode(preview(frames[0])).decode())

            clip = self._pipeline.generate(
                **options, keyframes=pictures, on_progress=self._on_progress, on_frames=on_frames
            )
            shutil.move(recording.save(clip), output)
        timings = {stage: float(seconds) for stage, seconds in clip.timings.items()}
        self._channel.say("made", seed=int(clip.seed), seconds=time.perf_counter() - start, timings=timings)

    def _on_progress(self, progress: Progress) -> bool:
        done = {"step": progress.step, "steps": progress.steps, "fraction": progress.fraction}
        self._channel.say("step", stage=progress.stage, **done)
        return not self._channel.cancelled.is_set()

    def _read(self, path: Path, place: int) -> NDArray[np.uint8]:
        """A keyframe in the clip's size [H, W, 3], which is all that is kept of it: three large ones would add up."""
        with path.open("rb") as file:
            try:
                picture = open_image(file, self._image_pixels)
                return fit(load_picture(picture, "image"), self._sizes.width, self._sizes.height)
            except InvalidRequest as error:
                raise JobFailed("invalid", str(error), keyframe=place) from None


def open_image(file: Any, max_pixels: int) -> Image.Image:
    """Reads the head of an image file; its pixels stay compressed.

    Raises:
        InvalidRequest: no image, of another format than `FORMATS`, or too large.
    """
    Image.init()
    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError:
        raise InvalidRequest(f"image: too many pixels; allowed are {max_pixels:,}") from None
    except Exception:  # what a damaged file makes a parser raise is not one class
        raise InvalidRequest(f"image: cannot be read; give a whole image as {', '.join(FORMATS)}") from None
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise InvalidRequest(f"image: {size} has too many pixels; allowed are {max_pixels:,}")
    return image


def preview(frame: NDArray[np.uint8]) -> bytes:
    """A small JPEG of a frame [H, W, 3]."""
    image = Image.fromarray(frame)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=80)
    return jpeg.getvalue()


def failure_of(error: Exception, options: dict[str, Any]) -> JobFailed:
    """What an exception means to the one who asked for the clip."""
    if isinstance(error, JobFailed):
        return error
    message = first_line(error)
    if isinstance(error, InvalidRequest):
        field = message.partition(":")[0]
        return JobFailed("invalid", message, field=field if field in options else None)
    if isinstance(error, Cancelled):
        return JobFailed("cancelled", message)
    if isinstance(error, DeviceOutOfMemory | MemoryError):
        return JobFailed("out_of_memory", message)
    return JobFailed("failed", message)


def is_final(error: Exception) -> bool:
    """Whether the options are to blame: bundle, backend, precision and threads stay as they are in the next process."""
    passing = isinstance(error, DeviceLost | DeviceOutOfMemory)
    return isinstance(error, InvalidRequest | BackendError | BundleError) and not passing


def load(pipeline: str, options: dict[str, Any]) -> Any:
    """Calls what `module:callable` names."""
    module, _, names = pipeline.partition(":")
    make: Any = import_module(module)
    for name in names.split("."):
        make = getattr(make, name)
    return make(**options)


def live_and_die_with_the_server() -> None:
    """Only the server ends this process: by its socket, or by its own death."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the whole process group gets them; the server drains first
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, ctypes.c_ulong(signal.SIGKILL))
    with suppress(OSError):  # where memory runs out this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Serves until the server or the device is gone."""
    faulthandler.enable()
    live_and_die_with_the_server()
    channel = Channel(int(sys.argv[1]))
    setup = channel.orders.get()
    os.nice(setup["nice"])
    try:
        jobs = Jobs(load(setup["pipeline"], setup["options"]), channel, setup["image_pixels"])
        channel.say("ready", about=jobs.about())
    except Exception as error:
        if not isinstance(error, SparseCtrlLcmError):
            traceback.print_exc()
        return channel.say("ended", message=f"could not load: {first_line(error)}", refused=is_final(error))
    while True:
        order = channel.orders.get()
        try:
            jobs.make(order["options"], order["keyframes"], order["output"])
        except DeviceLost as error:
            traceback.print_exc()
            return channel.say("ended", message=f"lost its device: {first_line(error)}")


if __name__ == "__main__":
    main()
    os._exit(1)  # without handlers at exit, which may wait for a device that is gone
