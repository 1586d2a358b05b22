"""Encodes frames to video files with PyAV."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Codec:
    """How a kind of video file is encoded, with the names and options of FFmpeg."""

    name: str
    options: dict[str, str]
    container: dict[str, str]


CODECS = {
    ".mp4": Codec("libx264", {"crf": "18", "preset": "medium"}, {"movflags": "+faststart"}),
    ".webm": Codec(
        "libvpx-vp9",
        # no lag: one pass gives the same bytes, and a recording does not wait for 25 frames
        {"crf": "24", "b": "0", "row-mt": "1", "deadline": "good", "lag-in-frames": "0"},
        {"fflags": "+bitexact"},  # else random track numbers change the bytes of the same clip
    ),
}
"""The video formats, by the ending of the file."""


def encode(
    path: Path, fps: float, frames: Iterable[NDArray[np.uint8]], height: int, width: int, text: str | None = None
) -> None:
    """Encodes frames [H, W, 3] to video, one by one; `text` becomes the comment of the file."""
    import av

    codec = CODECS[path.suffix.lower()]
    rate = Fraction(float(fps)).limit_denominator(1001)
    with av.open(str(path), "w", options=codec.container) as container:
        if text is not None:
            container.metadata["comment"] = text
        stream: Any = container.add_stream(codec.name, rate=rate, options=codec.options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_range = 1  # limited, which players expect for yuv420p
        context.colorspace = 6  # the matrix of BT.601, which the conversion uses
        context.color_primaries, context.color_trc = 1, 1  # of BT.709: frames are sRGB, which has its primaries
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def comment(path: Path) -> str | None:
    """The comment of a video file."""
    import av

    with av.open(str(path)) as container:
        return next((text for key, text in container.metadata.items() if key.lower() == "comment"), None)
