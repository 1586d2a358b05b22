"""Writing a clip: video files through PyAV, pictures through Pillow."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from numbers import Real
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .contact_sheet import contact_sheet
from .errors import InvalidRequest, OutputError, reason_of

if TYPE_CHECKING:
    from .clip import Clip

MAX_FPS = 60


def save(clip: "Clip", path: Path, fps: float) -> Path:
    """Writes `clip` in the format that the ending of `path` names; see `Clip.save`."""
    check_output(path, fps)
    if path.suffix:
        with _complete_file(path) as part:
            _WRITERS[path.suffix.lower()](clip, part, fps)
    else:
        _write_folder(clip, path)
    return path


def check_output(path: Path, fps: float) -> None:
    """Checks, before any work is done, that a clip can be written to `path`.

    Raises:
        InvalidRequest: the ending or the frame rate is not known.
        OutputError: the folder cannot be written.
    """
    if isinstance(fps, bool) or not isinstance(fps, Real) or not isfinite(fps) or not 1 <= fps <= MAX_FPS:
        raise InvalidRequest(f"fps: {fps!r} is not allowed; give a number from 1 to {MAX_FPS}")
    if path.suffix and path.suffix.lower() not in _WRITERS:
        allowed = ", ".join(_WRITERS)
        raise InvalidRequest(f"output: {path.suffix!r} is not a known format; allowed are {allowed} or a folder")
    if path.suffix and path.is_dir():
        raise OutputError(f"output: {str(path)!r} is a folder; name a file in it")
    if not path.suffix and path.exists() and not path.is_dir():
        raise OutputError(f"output: {str(path)!r} is a file; name a folder, or a file that ends in .mp4")
    if not path.suffix and path.is_dir() and any(path.iterdir()):
        raise OutputError(f"output: the folder {str(path)!r} is not empty; name a new one")
    parent = path if path.is_dir() else path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: Exception) -> OutputError:
    return OutputError(f"output: {str(path)!r} cannot be written: {reason_of(error)}")


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when all went well, and is gone otherwise."""
    part = path.with_name(f".{path.stem}-{token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        yield part
        part.replace(path)
    except Exception as error:  # PyAV and Pillow raise classes of their own
        raise _unwritable(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def _write_folder(clip: "Clip", path: Path) -> None:
    """One PNG a frame, in a folder that is new or empty."""
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
            path.rmdir()  # where nothing was written


def _write_video(path: Path, frames: NDArray[np.uint8], fps: float, codec: str, options: dict[str, str]) -> None:
    import av

    container_options = {"movflags": "+faststart"} if path.suffix.lower() == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(float(fps)).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_range = 1  # limited, as players expect of yuv420p
        context.colorspace = context.color_primaries = context.color_trc = 6  # BT.601, which the conversion uses
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_mp4(clip: "Clip", path: Path, fps: float) -> None:
    _write_video(path, clip.frames, fps, "libx264", {"crf": "18", "preset": "medium"})


def _write_webm(clip: "Clip", path: Path, fps: float) -> None:
    _write_video(path, clip.frames, fps, "libvpx-vp9", {"crf": "24", "b": "0", "row-mt": "1", "deadline": "good"})


def _write_gif(clip: "Clip", path: Path, fps: float) -> None:
    _write_animation(clip, path, fps, 10, {"disposal": 1, "optimize": False})


def _write_webp(clip: "Clip", path: Path, fps: float) -> None:
    _write_animation(clip, path, fps, 1, {"quality": 90, "method": 4})


def _write_animation(clip: "Clip", path: Path, fps: float, unit: int, options: dict[str, Any]) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in clip.frames)
    ends = [round(index * 1000 / fps / unit) * unit for index in range(len(clip.frames) + 1)]
    durations = [end - start for start, end in pairwise(ends)]  # GIF counts in hundredths: some are longer
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **options)


def _write_contact_sheet(clip: "Clip", path: Path, fps: float) -> None:
    contact_sheet(clip.frames, clip.keyframes).save(path)


_WRITERS: dict[str, Callable[["Clip", Path, float], None]] = {
    ".mp4": _write_mp4,
    ".webm": _write_webm,
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_contact_sheet,
}
