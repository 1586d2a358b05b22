"""Encodes a clip to bytes, and writes them to open files."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, OutputError, reason_of, shown
from .writers import ENDINGS, save

if TYPE_CHECKING:
    from .clip import Clip

FORMATS = tuple(ending.removeprefix(".") for ending in ENDINGS)


def encoded(clip: "Clip", format: Any, fps: float, text: str | None) -> bytes:
    """The bytes of the file that `Clip.save` writes; made in a temporary folder, since MP4 is not written in order."""
    if not isinstance(format, str) or format not in FORMATS:
        raise InvalidRequest("format", f"{shown(format)} is not allowed", f"allowed are {', '.join(FORMATS)}")
    try:
        with TemporaryDirectory(prefix="sparsectrl-lcm-") as folder:
            return save(clip, Path(folder) / f"clip.{format}", fps, text).read_bytes()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError("output", f"no temporary file can be written: {reason_of(error)}") from error


def write(file: Any, clip: "Clip", format: Any, fps: float, text: str | None) -> None:
    """Writes a clip to an open binary file."""
    if not hasattr(file, "write"):
        what = f"{type(file).__name__} is not allowed"
        raise InvalidRequest("output", what, "give a path or a file that is open for writing")
    data = memoryview(encoded(clip, format, fps, text))
    try:
        while data:
            count = file.write(data)
            data = data[len(data) if count is None else count :]  # unbuffered files may take a part
    except TypeError:
        raise InvalidRequest("output", "the file is open as text", "open it with mode 'wb'") from None
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise OutputError("output", f"the file cannot be written: {reason_of(error)}") from error


def check_no_format(format: Any) -> None:
    """Raises InvalidRequest if a format is given together with a path."""
    if format is not None:
        raise InvalidRequest("format", "the ending of a path names its format", "give a format with an open file only")
