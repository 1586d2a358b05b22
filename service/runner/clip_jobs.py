"""Jobs in the process that has the pipeline: reads keyframes, makes clips, encodes them, and reports all of it."""

import base64
import io
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...runtime import BackendError, Cancelled, DeviceLost, DeviceOutOfMemory, InvalidRequest, Keyframe, Progress
from ...runtime.disk_errors import is_disk_full
from ...runtime.errors import first_line, message
from ...runtime.format.clip_layout import ClipSize
from ...runtime.images import RESAMPLES, fit, load_picture
from ...runtime.output.recording import Recording
from .interface import FailureKind, JobFailed
from .picture_main import open_image
from .process_channel import Reports

FPS = 8
PREVIEW_SIDE = 256


@dataclass(frozen=True, slots=True)
class ClipOrder:
    """What the process with the pipeline is told of a `Job`.

    Attributes:
        options: keywords of `VideoPipeline.generate`.
        keyframes: frame and file of each.
        output: the file to write.
        previews: whether the messages have previews.
        fps: frames per second of the file.
    """

    options: dict[str, Any]
    keyframes: Sequence[tuple[int, str]]
    output: str
    previews: bool = False
    fps: float = FPS


class Jobs:
    """Makes clips with a pipeline. A clip is encoded while the next one is made.

    Args:
        pipeline: a `VideoPipeline`, or an object with its `generate`, `backend`, `precision` and `bundle`.
        image_pixels: pixels of the largest keyframe.
    """

    def __init__(self, pipeline: Any, image_pixels: int) -> None:
        self._pipeline = pipeline
        self._image_pixels = image_pixels
        self._sizes = pipeline.bundle.manifest.sizes
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._encoding: Future[None] = self._encoder.submit(lambda: None)

    def make(self, reports: Reports, order: ClipOrder) -> None:
        """Makes one clip and reports its result or failure. Returns when the pipeline is free for the next job.

        Raises:
            DeviceLost: the device can only be used again by a new process.
        """
        start = time.perf_counter()
        with reported(reports, order.options), ExitStack() as stack:
            recording = stack.enter_context(Recording(order.output, order.fps))
            clip = self._generate(reports, order, recording)
            self._encoding.result()  # so that only one clip is encoded while the next one is made
            reports.say("encoding")
            rest = stack.pop_all()

            def encode() -> None:
                with reported(reports, order.options), rest:
                    recording.save(clip)
                    timings = {stage: float(seconds) for stage, seconds in clip.timings.items()}
                    made = {"seed": int(clip.seed), "timings": timings, "frames": len(clip.frames)}
                    reports.say("made", seconds=time.perf_counter() - start, **made)

            self._encoding = self._encoder.submit(encode)

    def finish(self) -> None:
        """Waits for the end of the last clip."""
        self._encoding.result()

    def _generate(self, reports: Reports, order: ClipOrder, recording: Recording) -> Any:
        options = order.options
        self._check_engines(options)
        files = enumerate(order.keyframes)
        pictures = [Keyframe(index, self._read(Path(path), place, options)) for place, (index, path) in files]

        def on_progress(progress: Progress) -> bool:
            done = {"step": progress.step, "steps": progress.steps, "fraction": progress.fraction}
            reports.say("step", stage=progress.stage, **done)
            return not reports.cancelled.is_set()

        def on_frames(first: int, frames: NDArray[np.uint8]) -> None:
            recording.add(first, frames)
            if order.previews:
                _show(reports, first, frames[0])

        if order.previews:
            options = {**options, "on_preview": lambda _, index, frame: _show(reports, index, frame)}
        return self._pipeline.generate(**options, keyframes=pictures, on_progress=on_progress, on_frames=on_frames)

    def _check_engines(self, options: dict[str, Any]) -> None:
        """Fails a job whose size none of the engines has, if the backend needs one for each size."""
        of_bundle = {"width": self._sizes.width, "height": self._sizes.height, "num_frames": self._sizes.frames}
        given = [name for name in of_bundle if name in options]
        width, height, frames = (options.get(name, default) for name, default in of_bundle.items())
        lengths = {frames, min(frames, self._sizes.frames)}  # at once, or in windows of the bundle's length
        sizes = [ClipSize(width=width, height=height, frames=length) for length in lengths]
        if given and not any(self._pipeline.executor.in_one_piece(size) for size in sizes):
            told = f"this server has no engines for {frames} frames of {width}x{height}"
            raise JobFailed("invalid", told, field=given[0])

    def _read(self, path: Path, place: int, options: dict[str, Any]) -> NDArray[np.uint8]:
        """Reads a keyframe and resizes it to the clip's size [H, W, 3]. Frees the large original at once."""
        width, height = options.get("width", self._sizes.width), options.get("height", self._sizes.height)
        with path.open("rb") as file:
            try:
                picture = open_image(file, self._image_pixels)
                return fit(load_picture(picture, "image"), width, height, options.get("resample", RESAMPLES[0]))
            except InvalidRequest as error:
                raise JobFailed("invalid", str(error), keyframe=place) from None


@contextmanager
def reported(reports: Reports, options: dict[str, Any]) -> Iterator[None]:
    """Reports an exception of the block as the failure of a job with these options, except DeviceLost."""
    try:
        yield
    except DeviceLost:
        raise
    except Exception as error:  # after any error, the next job may succeed
        failure = failure_of(error, options)
        if failure.kind in ("failed", "out_of_memory"):
            traceback.print_exc()
        says = {"kind": failure.kind, "message": failure.message}
        reports.say("failed", **says, field=failure.field, keyframe=failure.keyframe)


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


def _show(reports: Reports, index: int, frame: NDArray[np.uint8]) -> None:
    reports.say("preview", index=index, jpeg=base64.b64encode(preview(frame)).decode())


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
    of_weights = isinstance(error, BackendError) and error.field == "refit"
    kind: FailureKind = "disk_full" if is_disk_full(error) else "failed"
    return JobFailed(kind, first_line(error), field="weights" if of_weights else None)
