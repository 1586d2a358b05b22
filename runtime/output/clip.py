"""The result of a request."""

import os
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from ..request import FittedKeyframe
from .metadata import as_text


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """The frames of a clip, and how they were made.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB.
        seed: the seed that was used; drawn at random if none was given.
        timings: seconds per stage: load (opening graphs at their first use), inputs (on a GPU), text, keyframes,
            control, denoise, decode, capture (on a GPU, of the first requests of a kind), total. A stage whose result
            was kept from an earlier request is missing.
        keyframes: the keyframes in the clip's size, as the model got them.
        metadata: what was asked for and what made it; values of JSON.
    """

    frames: NDArray[np.uint8] = field(repr=False)
    seed: int
    timings: dict[str, float]
    keyframes: tuple[FittedKeyframe, ...] = field(default=(), repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @overload
    def save(self, output: str | os.PathLike[str], fps: float = 8, *, metadata: bool = True) -> Path: ...

    @overload
    def save(self, output: IO[bytes], fps: float = 8, *, format: str, metadata: bool = True) -> None: ...

    def save(
        self,
        output: str | os.PathLike[str] | IO[bytes],
        fps: float = 8,
        *,
        format: str | None = None,
        metadata: bool = True,
    ) -> Path | None:
        """Writes the clip to a path, or to an open binary file.

        A file at a path appears only when it is complete. An open file gets the same bytes, at once, and stays open.

        Args:
            output: a path: `.mp4` (H.264), `.webm` (VP9), `.gif`, `.webp`, `.png` (contact sheet), or a folder (a PNG
                per frame); or a file.
            fps: frames per second, 1 to 60; for `.gif` 1 to 50.
            format: of a file: `mp4`, `webm`, `gif`, `webp` or `png`. A path's ending says it.
            metadata: whether prompt, seed and the rest of `Clip.metadata` go into the file.

        Raises:
            OutputError: the output cannot be written.
            InvalidRequest: the ending or the format is unknown, or the frame rate is not allowed.
        """
        from . import clip_bytes, writers

        text = as_text(self.metadata if metadata else {})
        if isinstance(output, str | os.PathLike):
            clip_bytes.check_no_format(format)
            return writers.save(self, Path(output), fps, text)
        clip_bytes.write(output, self, format, fps, text)
        return None

    def to_bytes(self, format: str = "mp4", fps: float = 8, *, metadata: bool = True) -> bytes:
        """The bytes of the file that `save` writes.

        Args:
            format: `mp4`, `webm`, `gif`, `webp` or `png`.
            fps, metadata: as for `save`.

        Raises:
            OutputError: no temporary file can be written.
            InvalidRequest: the format is unknown, or the frame rate is not allowed.
        """
        from .clip_bytes import encoded

        return encoded(self, format, fps, as_text(self.metadata if metadata else {}))

    def _repr_html_(self) -> str:
        """The clip as a video that notebooks play."""
        video = b64encode(self.to_bytes("mp4")).decode()
        height, width = self.frames.shape[1:3]
        return (
            f'<video width="{width}" height="{height}" controls autoplay loop muted playsinline '
            f'src="data:video/mp4;base64,{video}"></video>'
        )
