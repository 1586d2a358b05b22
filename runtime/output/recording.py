"""Writes a clip while its frames are made."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest
from . import video
from .clip import Clip
from .metadata import as_text
from .writers import check_output, complete_file, save

MAX_WAITING = 32
"""Parts of a clip that can wait for the encoder."""


class Recording:
    """Writes a clip while its frames are made. If its block ends before `save`, the file is removed.

    A separate thread encodes video to the bytes that `Clip.save` writes for the same metadata. VP9 keeps pace with the
    frames. H.264 looks 40 frames ahead, so a shorter clip is only converted meanwhile. `save` writes other formats.

    >>> with Recording("clip.mp4") as recording:
    ...     clip = pipeline.generate("a boat", on_frames=recording.add)
    ...     recording.save(clip)

    Args:
        path: as in `Clip.save`.
        fps: frames per second, as in `Clip.save`.
        metadata: what goes into the file; `VideoPipeline.metadata` gives it before the clip is made. Empty writes none.
            None writes `Clip.metadata`, which comes too late for a video that has been begun.

    Raises:
        InvalidRequest: the ending or the frame rate is not known.
        OutputError: the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 8, metadata: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.fps = fps
        self._metadata = metadata
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
        if self.path.suffix.lower() not in video.CODECS:
            return
        if self._encoder is None:
            self._encoder = Thread(target=self._work, args=frames.shape[1:3], name="encoder", daemon=True)
            self._encoder.start()
        self._parts.put(frames)

    def save(self, clip: Clip) -> Path:
        """Writes the frames of `clip` that were not added yet. The file appears only now.

        Raises:
            OutputError: the path cannot be written.
        """
        if self._encoder is None:
            metadata = clip.metadata if self._metadata is None else self._metadata
            return save(clip, self.path, self.fps, as_text(metadata))
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
            with complete_file(self.path) as part:
                video.encode(part, self.fps, frames, height, width, as_text(self._metadata or {}))
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

    def _check(self) -> None:
        if self._dropped:
            raise _Dropped


class _Dropped(Exception):
    """The block ended before the clip was saved."""
