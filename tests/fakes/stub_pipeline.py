"""A pipeline without a model: `stub_pipeline:load`, with this folder in PYTHONPATH. The prompt controls its behaviour.

    crash, hang, oom, device oom, device lost, fail, invalid, noisy: does so at the second of four steps
    slow SECONDS: each step takes that long
    held FILE: its step N waits, from the second on, until the file has N - 1 bytes; meanwhile it says that it is at 0
    process: the seed is the number of the process
    anything else: a clip of frames 64x64 in a colour that the seed gives, with the keyframes at their frames

The folder `bundle` may be called `8-frames`: its clips then have so many.

`backend` controls loading:

    flaky: fails once per file that `bundle` names
    broken: always fails
    refused: raises BundleError
    invalid: raises InvalidRequest
    unusable: raises BackendError
    lost: loads once, then raises BundleError as long as the file that `bundle` names exists
    slow: never finishes
"""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from sparsectrl_lcm.runtime.errors import (
    BackendError,
    BundleError,
    Cancelled,
    DeviceLost,
    DeviceOutOfMemory,
    InvalidRequest,
)
from sparsectrl_lcm.runtime.output.clip import Clip
from sparsectrl_lcm.runtime.progress import Progress

SIDE, FRAMES, CHUNK = 64, 16, 8


def load(
    bundle: str | None = None, backend: str = "auto", precision: str | None = None, **share: Any
) -> "StubPipeline":
    if backend == "slow":
        time.sleep(3600)
    if backend == "broken" or (backend == "flaky" and not Path(str(bundle)).exists()):
        Path(str(bundle)).touch()
        raise OSError("the stub does not load")
    if backend == "invalid":
        raise InvalidRequest("precision", "'int2' is not allowed", "give fp32")
    if backend == "unusable":
        raise BackendError("backend", "the stub's cannot run here", "give another")
    if backend == "refused" or (backend == "lost" and Path(str(bundle)).exists()):
        raise BundleError("bundle", "the stub's is wrong")
    if backend == "lost":
        Path(str(bundle)).touch()
    return StubPipeline(bundle, backend, precision)


def load_numbered(bundle: str, **options: Any) -> "StubPipeline":
    """Loads a bundle whose name is a number. Requests without a seed get this one, so that clips tell their bundle."""
    pipeline = load(bundle, **options)
    pipeline.drawn = int(Path(bundle).name)
    return pipeline


class StubPipeline:
    def __init__(self, bundle: str | None, backend: str, precision: str | None) -> None:
        own = re.fullmatch(r"(\d+)-frames", Path(bundle or "").name)
        self.frames = int(own[1]) if own else FRAMES
        sizes = SimpleNamespace(width=SIDE, height=SIDE, frames=self.frames)
        self.bundle = SimpleNamespace(folder=Path(bundle or "stub"), manifest=SimpleNamespace(sizes=sizes))
        self.backend = backend
        self.precision = precision
        self.drawn = 1234
        """The seed of requests without one."""
        self.executor = SimpleNamespace(in_one_piece=lambda size: (size.width, size.frames) == (SIDE, FRAMES))

    def picture(self, seed: int) -> Any:
        return picture(seed)

    def generate(
        self,
        prompt: str,
        keyframes: Sequence[Any] = (),
        controlnet: str = "scribble",
        negative_prompt: str = "",
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        on_progress: Any = None,
        on_frames: Any = None,
        on_preview: Any = None,
        num_frames: int | None = None,
        **sizes: Any,
    ) -> Clip:
        num_frames = num_frames or self.frames
        seed = self.drawn if seed is None else seed
        if prompt == "process":
            seed = os.getpid()
        words = prompt.split()
        pause = float(words[1]) if words[:1] == ["slow"] else 0.0
        parts = -(-num_frames // CHUNK)
        total = num_inference_steps + parts
        frames = np.resize(self.picture(seed), (num_frames, SIDE, SIDE, 3))
        for step in range(num_inference_steps + 1):
            if on_progress and on_progress(Progress("denoise", step, num_inference_steps, step / total)) is False:
                raise Cancelled("", f"cancelled after denoise {step} of {num_inference_steps}")
            if on_preview and step:
                on_preview(step, num_frames // 2, frames[num_frames // 2])
            if step == 1:
                behave(prompt)
            while words[:1] == ["held"] and not is_let_go(Path(words[1]), step):
                if on_progress and on_progress(Progress("denoise", 0, num_inference_steps, 0.0)) is False:
                    raise Cancelled("", f"cancelled within denoise {step} of {num_inference_steps}")
                time.sleep(0.02)
            time.sleep(pause)
        for keyframe in keyframes:
            frames[keyframe.index] = keyframe.image
        for part, first in enumerate(range(0, num_frames, CHUNK), 1):
            if on_frames:
                on_frames(first, frames[first : first + CHUNK])
            if on_progress:
                on_progress(Progress("decode", part, parts, (num_inference_steps + part) / total))
        return Clip(frames=frames, seed=seed, timings={"denoise": pause * num_inference_steps, "total": pause})


def is_let_go(file: Path, step: int) -> bool:
    return step == 0 or (file.exists() and file.stat().st_size >= step)


def picture(seed: int) -> Any:
    """Returns uint8 [16, 64, 64, 3]: one colour that the seed gives, a little brighter in each frame."""
    colour = np.array([40 + seed % 150, 40 + seed // 150 % 150, 90])
    return (np.zeros((FRAMES, SIDE, SIDE, 3)) + colour + np.arange(FRAMES)[:, None, None, None]).astype(np.uint8)


def behave(prompt: str) -> None:
    match prompt:
        case "crash":
            os.write(2, b"these are\nthe last words\n")
            os._exit(3)
        case "hang":
            time.sleep(3600)
        case "oom":
            raise MemoryError("no memory for the stub")
        case "device oom":
            raise DeviceOutOfMemory("", "no memory on the device")
        case "device lost":
            raise DeviceLost("", "the device has fallen off")
        case "fail":
            raise RuntimeError("the stub failed\nwith details")
        case "invalid":
            raise InvalidRequest("controlnet", "'x' is not in this bundle", "allowed are scribble")
        case "noisy":
            print('{"say": "made"}', flush=True)
            os.write(1, b"\xff no newline " * 100_000)
