"""A worker process that makes clips with one backend, so that its memory use is that of the backend."""

import time
from typing import Any

import numpy as np

from ...runtime.cpu.executor import HostExecutor
from ...runtime.machine import peak_bytes
from ...runtime.pipeline import VideoPipeline
from ...runtime.request import ClipRequest, Keyframe
from .measured_requests import PROMPT, SEED, scribbles
from .worker_process import serve


class PipelineWorker:
    """Answers `load` first, then `warm_up` and `generate`."""

    def __init__(self) -> None:
        self._pipeline: VideoPipeline | None = None

    def load(self, **options: Any) -> dict[str, Any]:
        """Opens a bundle with the arguments of `VideoPipeline.load`. Returns the precision of its engines."""
        self._pipeline = VideoPipeline.load(**options)
        return {"precision": getattr(self._pipeline, "precision", None)}

    def warm_up(self, save: str | None = None, **request: Any) -> dict[str, Any]:
        """Opens the graphs with a first request, and saves its frames in the file `save`.

        On a GPU three more requests follow, so that every kind of request is captured and replayed once.
        """
        reply = self.generate(PROMPT, SEED, save=save, **request)
        if not isinstance(self.pipeline.executor, HostExecutor):
            for prompt, seed in ((PROMPT, SEED + 1), (f"{PROMPT}, again", SEED), (f"{PROMPT}, again", SEED + 1)):
                self.generate(prompt, seed, **request)
        return reply

    def generate(
        self,
        prompt: str,
        seed: int,
        width: int,
        height: int,
        frames: int,
        steps: int,
        guidance: float,
        save: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Makes a clip. Returns the seconds of the request and its stages, and the process's peak memory so far."""
        pictures = [Keyframe(index, pixels) for index, pixels in scribbles(width, height, frames).items()]
        kinds = self.pipeline.bundle.manifest.controlnets
        request = ClipRequest(
            prompt,
            pictures if kinds else (),
            "scribble" if "scribble" in kinds or not kinds else kinds[0],
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            height=height,
            width=width,
            num_frames=frames,
            **options,
        )
        begin = time.perf_counter()
        clip = self.pipeline.run(request)
        seconds = {**clip.timings, "total": time.perf_counter() - begin}
        if save is not None:
            np.save(save, clip.frames)
        return {"seconds": seconds, "peak_bytes": peak_bytes()}

    @property
    def pipeline(self) -> VideoPipeline:
        """The pipeline that `load` opened."""
        assert self._pipeline is not None
        return self._pipeline


if __name__ == "__main__":
    worker = PipelineWorker()
    serve({"load": worker.load, "warm_up": worker.warm_up, "generate": worker.generate})
