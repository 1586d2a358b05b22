"""Writes a clip: video files with PyAV, pictures with Pillow."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from numbers import Real
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, OutputError, reason_of, shown
from ..format.temporary_folders import created_folder
from ..operating_system import UNFINISHED, check_writable
from . import video
from .contact_sheet import contact_sheet
from .metadata import IMAGE_DESCRIPTION, KEY

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from .clip import Clip

MAX_FPS = 60
MAX_GIF_FPS = 50
"""Browsers show a frame shorter than two hundredths of a second for ten hundredths."""
_unfinished: set[Path] = set()
"""Temporary files of `complete_file` that are being written."""


def save(clip: "Clip", path: Path, fps: float, text: str | None = None) -> Path:
    """Writes `clip` in the format of `path`'s ending; see `Clip.save`. `text` is its metadata."""
    check_output(path, fps)
    if (write := _WRITERS.get(path.suffix.lower())) is not None:
        with complete_file(path) as part:
            write(clip, part, fps, text)
    else:
        _write_folder(clip, path, text)
    return path


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
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`. It replaces `path` if the block succeeds, and is removed if not."""
    part = path.with_name(f"{UNFINISHED}{token_hex(4)}{path.suffix}")  # short, because a long name leaves no room
    _unfinished.add(part)
    try:
        with created_folder(path.parent):
            try:
                part.touch(exist_ok=False)
                yield part
                part.replace(path)
            finally:
                with suppress(OSError):
                    part.unlink()
    except Exception as error:  # PyAV and Pillow have their own exception classes
        raise _unwritable(path, error) from error
    finally:
        _unfinished.discard(part)


def remove_unfinished() -> None:
    """Removes the files that this process is writing, before it ends without doing so itself."""
    for part in list(_unfinished):
        with suppress(OSError):
            part.unlink()


def remove_parts(folder: Path) -> None:
    """Removes the unfinished files that killed processes have left in a folder. No other process may write there."""
    for part in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            part.unlink()


def _write_folder(clip: "Clip", path: Path, text: str | None) -> None:
    """Writes one PNG per frame to a folder that is new or empty."""
    from PIL import Image

    digits = max(3, len(str(len(clip.frames) - 1)))
    part = path / f"{UNFINISHED}{token_hex(4)}"
    try:
        with created_folder(path):
            try:
                part.mkdir()
                for index, frame in enumerate(clip.frames):
                    Image.fromarray(frame).save(part / f"frame_{index:0{digits}d}.png", pnginfo=_png_text(text))
                for file in sorted(part.iterdir()):
                    file.replace(path / file.name)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_video(clip: "Clip", path: Path, fps: float, text: str | None) -> None:
    height, width = clip.frames.shape[1:3]
    video.encode(path, fps, clip.frames, height, width, text)


def _write_gif(clip: "Clip", path: Path, fps: float, text: str | None) -> None:
    _write_animation(clip, path, fps, 10, {"disposal": 1, "optimize": False} | ({KEY: text} if text else {}))


def _write_webp(clip: "Clip", path: Path, fps: float, text: str | None) -> None:
    _write_animation(clip, path, fps, 1, {"quality": 90, "method": 4, "exif": _exif(text)})


def _write_animation(clip: "Clip", path: Path, fps: float, unit: int, options: dict[str, Any]) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in clip.frames)
    ends = [round(index * 1000 / fps / unit) * unit for index in range(len(clip.frames) + 1)]
    durations = [end - start for start, end in pairwise(ends)]  # some are longer, since GIF counts in hundredths
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, **options)


def _write_contact_sheet(clip: "Clip", path: Path, fps: float, text: str | None) -> None:
    save_sheet(contact_sheet(clip.frames, clip.keyframes), path, text)


def save_sheet(sheet: "Image.Image", path: Path, text: str | None) -> None:
    """Writes a contact sheet with its metadata."""
    sheet.save(path, pnginfo=_png_text(text))


def _png_text(text: str | None) -> "PngInfo | None":
    if text is None:
        return None
    from PIL.PngImagePlugin import PngInfo

    found = PngInfo()
    found.add_text(KEY.title(), text)
    return found


def _exif(text: str | None) -> bytes:
    from PIL import Image

    if text is None:
        return b""
    found = Image.Exif()
    found[IMAGE_DESCRIPTION] = text
    return found.tobytes()


_WRITERS: dict[str, Callable[["Clip", Path, float, str | None], None]] = {
    ".mp4": _write_video,
    ".webm": _write_video,
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_contact_sheet,
}
ENDINGS = tuple(_WRITERS)
"""Of the files that clips can be written to."""
