"""Writes a clip: video files with PyAV, pictures with Pillow."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from numbers import Real
from pathlib import Path
from queue import Full, Queue
from secrets import token_hex
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, OutputError, reason_of, shown
from ..operating_system import check_writable
from .contact_sheet import contact_sheet

if TYPE_CHECKING:
    from .clip import Clip

MAX_FPS = 60
MAX_GIF_FPS = 50
"""Browsers show a frame shorter than two hundredths of a second for ten hundredths."""
MAX_WAITING = 32
"""Parts of a clip that can wait for the encoder."""


def save(clip: "Clip", path: Path, fps: float) -> Path:
    """Writes `clip` in the format of `path`'s ending; see `Clip.save`."""
    check_output(path, fps)
    if (write := _WRITERS.get(path.suffix.lower())) is not None:
        with _complete_file(path) as part:
            write(clip, part, fps)
    else:
        _write_folder(clip, path)
    return path


class Recording:
    """Writes a clip while its frames are made. If its block ends before `save`, the file is removed.

    A separate thread encodes video to the same bytes that `Clip.save` writes. VP9 keeps pace with the frames. H.264
    looks 40 frames ahead, so a shorter clip is only converted meanwhile. `save` writes other formats.

    >>> with Recording("clip.mp4") as recording:
    ...     clip = pipeline.generate("a boat", on_frames=recording.add)
    ...     recording.save(clip)

    Args:
        path: as in `Clip.save`.
        fps: frames per second, as in `Clip.save`.

    Raises:
        InvalidRequest: the ending or the frame rate is not known.
        OutputError: the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 8) -> None:
        self.path = Path(path)
        self.fps = fps
        check_output(self.path, fps)
        self._parts: Queue[NDArray[np.uint8] | None] = Queue(MAX_WAITING)  # None is the end
        self._arrived = 0
        self._dropped = False
        self._encoder: Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        if self._encoder is not None and self._encoder.is_alive():
            self._dropped = True
            with suppress(Full):  # a full queue: the thread sees `_dropped` at its next frame
                self._parts.put_nowait(None)
            self._encoder.join()

    def add(self, first: int, frames: NDArray[np.uint8]) -> None:
        """Adds the next frames [n, H, W, 3], which must not change until the clip is saved.

        Waits if the encoder is far behind. `save` raises the encoder's errors.

        Raises:
            InvalidRequest: `first` is not the index of the next frame.
        """
        if first != self._arrived:
            raise InvalidRequest("frames", f"{first} is not the next frame", "a recording takes one clip, in order")
        self._arrived += len(frames)
        if self.path.suffix.lower() not in _CODECS:
            return
        if self._encoder is None:
            self._encoder = Thread(target=self._work, args=frames.shape[1:3], name="encoder", daemon=True)
            self._encoder.start()
        self._parts.put(frames)

    def save(self, clip: "Clip") -> Path:
        """Writes the frames of `clip` that were not added yet. The file appears only now.

        Raises:
            OutputError: the path cannot be written.
        """
        if self._encoder is None:
            return save(clip, self.path, self.fps)
        if self._arrived < len(clip.frames):
            self.add(self._arrived, clip.frames[self._arrived :])
        self._parts.put(None)
        self._encoder.join()
        if self._error is not None:
            raise self._error
        return self.path

    def _work(self, height: int, width: int) -> None:
        """The encoder thread. After an error, takes the remaining frames without encoding them."""
        frames = self._frames()
        try:
            with _complete_file(self.path) as part:
                _encode(part, self.fps, frames, height, width)
                self._check()
        except Exception as error:
            self._error = error
        with suppress(_Dropped):
            for _ in frames:
                pass

    def _frames(self) -> Iterator[NDArray[np.uint8]]:
        """Frames [H, W, 3] as they arrive."""
        while (frames := self._parts.get()) is not None:
            for frame in frames:
                self._check()
                yield frame
        self._check()

    def _check(self) -> None:
        if self._dropped:
            raise _Dropped


class _Dropped(Exception):
    """The block ended before the clip was saved."""


def check_output(path: Path, fps: float) -> None:
    """Checks, before any work is done, that a clip can be written to `path`.

    Raises:
        InvalidRequest: the ending or the frame rate is not known.
        OutputError: the folder cannot be written.
    """
    suffix = path.suffix.lower()
    if path.name.lower() in _WRITERS:
        raise InvalidRequest("output", f"{path.name!r} is an ending alone", "put a name before it")
    most, where = (MAX_GIF_FPS, " for .gif") if suffix == ".gif" else (MAX_FPS, "")
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 1 <= fps <= most:
        raise InvalidRequest("fps", f"{shown(fps)} is not allowed{where}", f"give a number from 1 to {most}")
    try:
        with suppress(FileNotFoundError):
            path.stat()  # raises errors that the checks below would hide or miss
        is_folder, exists = path.is_dir(), path.exists()
        not_empty = is_folder and any(path.iterdir())
        place = path if is_folder else next(parent for parent in path.parents if parent.exists())
        check_writable(place)
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        raise _unwritable(path, error) from None
    if suffix in _WRITERS and is_folder:
        raise OutputError("output", f"{str(path)!r} is a folder", "name a file in it")
    if suffix and suffix not in _WRITERS and not is_folder:
        allowed = ", ".join(_WRITERS)
        allowed += " or a folder (if its name has a dot, create it first)"
        raise InvalidRequest("output", f"{path.suffix!r} is not a known format", f"allowed are {allowed}")
    if not suffix and exists and not is_folder:
        raise OutputError("output", f"{str(path)!r} is a file", "name a folder, or a file that ends in .mp4")
    if suffix not in _WRITERS and not_empty:
        raise OutputError("output", f"the folder {str(path)!r} is not empty", "name a new one")


def _unwritable(path: Path, error: Exception) -> OutputError:
    return OutputError("output", f"{str(path)!r} cannot be written: {reason_of(error)}")


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`. It replaces `path` if the block succeeds, and is removed if not."""
    part = path.with_name(f".{token_hex(4)}{path.suffix}")  # short, because a long name leaves no room
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        yield part
        part.replace(path)
    except Exception as error:  # PyAV and Pillow have their own exception classes
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # succeeds if nothing was written


def _write_folder(clip: "Clip", path: Path) -> None:
    """Writes one PNG per frame to a folder that is new or empty."""
    from PIL import Image

    digits = max(3, len(str(len(clip.frames) - 1)))
    part = path / f".part-{token_hex(4)}"
    try:
        part.mkdir(parents=True)
        for index, frame in enumerate(clip.frames):
            Image.fromarray(frame).save(part / f"frame_{index:0{digits}d}.png")
        for file in sorted(part.iterdir()):
            file.replace(path / file.name)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            path.rmdir()  # succeeds if nothing was written


@dataclass(frozen=True, slots=True)
class _Codec:
    name: str
    options: dict[str, str]
    container: dict[str, str]


_CODECS = {
    ".mp4": _Codec("libx264", {"crf": "18", "preset": "medium"}, {"movflags": "+faststart"}),
    ".webm": _Codec(
        "libvpx-vp9",
        # no lag: one pass gives the same bytes, and a recording does not wait for 25 frames
        {"crf": "24", "b": "0", "row-mt": "1", "deadline": "good", "lag-in-frames": "0"},
        {"fflags": "+bitexact"},  # else random track numbers change the bytes of the same clip
    ),
}


def _encode(path: Path, fps: float, frames: Iterable[NDArray[np.uint8]], height: int, width: int) -> None:
    """Encodes frames [H, W, 3] to video, one by one."""
    import av

    codec = _CODECS[path.suffix.lower()]
    rate = Fraction(float(fps)).limit_denominator(1001)
    with av.open(str(path), "w", options=codec.container) as container:
        stream: Any = container.add_stream(codec.name, rate=rate, options=codec.options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_range = 1  # limited, which players expect for yuv420p
        context.colorspace = context.color_primaries = context.color_trc = 6  # BT.601, which the conversion uses
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_video(clip: "Clip", path: Path, fps: float) -> None:
    _encode(path, fps, clip.frames, *clip.frames.shape[1:3])


def _write_gif(clip: "Clip", path: Path, fps: float) -> None:
    _write_animation(clip, path, fps, 10, {"disposal": 1, "optimize": False})


def _write_webp(clip: "Clip", path: Path, fps: float) -> None:
    _write_animation(clip, path, fps, 1, {"quality": 90, "method": 4})


def _write_animation(clip: "Clip", path: Path, fps: float, unit: int, options: dict[str, Any]) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in clip.frames)
    ends = [round(index * 1000 / fps / unit) * unit for index in range(len(clip.frames) + 1)]
    durations = [end - start for start, end in pairwise(ends)]  # some are longer, since GIF counts in hundredths
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **options)


def _write_contact_sheet(clip: "Clip", path: Path, fps: float) -> None:
    contact_sheet(clip.frames, clip.keyframes).save(path)


_WRITERS: dict[str, Callable[["Clip", Path, float], None]] = {
    ".mp4": _write_video,
    ".webm": _write_video,
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_contact_sheet,
}
