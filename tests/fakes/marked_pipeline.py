"""A stub pipeline whose clips can be told apart: `fakes.marked_pipeline:load`, with `tests` in PYTHONPATH.

Every frame shows the 16 bits of the seed as bright and dark squares. `MADE` names a file that gets a line for each clip
made: its seed, and when making it began and ended, as `time.time`.
"""

import base64
import io
import os
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from fakes.stub_pipeline import FRAMES, SIDE, StubPipeline
from PIL import Image

GRID = 4


def squares(seed: int) -> Any:
    """Returns a frame, uint8 [64, 64, 3]."""
    bits = seed >> np.arange(GRID * GRID) & 1
    levels = np.where(bits, 220, 30).astype(np.uint8).reshape(GRID, GRID)
    return np.repeat(np.kron(levels, np.ones((SIDE // GRID, SIDE // GRID), np.uint8))[:, :, None], 3, 2)


def keyframe(seed: int) -> str:
    """Returns the frame as a data URI."""
    png = io.BytesIO()
    Image.fromarray(squares(seed)).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


class MarkedPipeline(StubPipeline):
    def picture(self, seed: int) -> Any:
        return np.stack([squares(seed)] * FRAMES)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        begun = time.time()
        clip = super().generate(*arguments, **options)
        with Path(os.environ["MADE"]).open("a") as file:
            file.write(f"{clip.seed} {begun} {time.time()}\n")
        return clip


def load(**options: Any) -> MarkedPipeline:
    return MarkedPipeline(None, "stub", None)


def seed_of(clip: bytes) -> int:
    """Reads the seed from an mp4. Every frame has to show the same one."""
    with av.open(io.BytesIO(clip)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == FRAMES
    levels = np.stack(frames).reshape(FRAMES, GRID, SIDE // GRID, GRID, SIDE // GRID, 3).mean((2, 4, 5))
    seeds = {int(((level.ravel() > 125) << np.arange(GRID * GRID)).sum()) for level in levels}
    assert len(seeds) == 1, seeds
    return seeds.pop()
