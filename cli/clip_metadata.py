"""What `inspect CLIP` prints."""

import json
from pathlib import Path

import typer

from ..runtime.errors import InvalidRequest
from ..runtime.output.metadata import read_metadata


def is_clip(path: Path) -> bool:
    """Whether a path is a file, or a folder of frames, and so no bundle."""
    return path.is_file() or (path / "frame_000.png").is_file()


def show_clip(path: Path, *, as_json: bool) -> None:
    """Prints what a clip was made from.

    Raises:
        InvalidRequest: it is no clip, or does not say it.
        OutputError: it cannot be read.
    """
    found = read_metadata(path)
    if found is None:
        reason = f"{str(path)!r} does not say what it was made from"
        raise InvalidRequest("clip", reason, "only clips of this package do, without --no-metadata")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        typer.echo(f"{name.replace('_', ' ') + ':':<22}{value if isinstance(value, str) else json.dumps(value)}")
