"""A process that makes clips with diffusers on the CPU, as it is and compiled, on one set of weights."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from models import diffusers_pipeline, watch_stages
from sparsectrl_lcm.benchmarks.harness.processes import serve
from sparsectrl_lcm.benchmarks.harness.requests import PROMPT, SEED, scribbles
from sparsectrl_lcm.runtime.machine import peak_bytes

COMMAND = (sys.executable, __file__)
PRODUCT_SIDE = 4096
COPIED_BYTES = 2**28


class DiffusersWorker:
    """Answers `load`, then `warm_up`, `generate` and `limits`."""

    def __init__(self) -> None:
        self.pipe: Any = None
        self.compiled = False
        self.requests: list[dict[str, float]] = []

    def load(self, checkpoints: str, dtype: str, threads: int) -> dict[str, Any]:
        """Loads the pipeline in a precision of torch."""
        import torch

        torch.set_num_threads(threads)
        self.pipe = diffusers_pipeline(Path(checkpoints), getattr(torch, dtype))
        for model in (self.pipe.unet, self.pipe.controlnet, self.pipe.vae.decoder):
            self.make_switchable(model)
        self.requests = watch_stages(self.pipe)
        return {"precision": dtype, "threads": torch.get_num_threads()}

    def make_switchable(self, model: Any) -> None:
        """From here on a model runs compiled or as it is, as `compiled` says."""
        plain = model._call_impl
        model.compile()
        compiled = model._compiled_call_impl

        def call(*arguments: Any, **keywords: Any) -> Any:
            return (compiled if self.compiled else plain)(*arguments, **keywords)

        model._compiled_call_impl = call

    def warm_up(self, save: str | None = None, **request: Any) -> dict[str, Any]:
        """A first request, whose frames go to the file `save`; compiled models are compiled by it."""
        return self.generate(PROMPT, SEED, save=save, **request)

    def generate(
        self,
        prompt: str,
        seed: int,
        width: int,
        height: int,
        frames: int,
        steps: int,
        guidance: float,
        compiled: bool = False,
        save: str | None = None,
    ) -> dict[str, Any]:
        """Seconds of a request and of its stages, and the largest memory since the models were last switched."""
        import torch
        from PIL import Image

        if compiled != self.compiled:
            self.compiled = compiled
            forget_peak()
        self.requests.append({})
        pictures = scribbles(width, height, frames)
        begin = time.perf_counter()
        clip = self.pipe(
            prompt,
            negative_prompt="",
            num_inference_steps=steps,
            guidance_scale=guidance,
            conditioning_frames=[Image.fromarray(picture) for picture in pictures.values()],
            controlnet_frame_indices=list(pictures),
            num_frames=frames,
            width=width,
            height=height,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        ).frames[0]
        pixels = (clip * 255).round().astype(np.uint8)
        total = time.perf_counter() - begin
        if save is not None:
            np.save(save, pixels)
        return {"seconds": self.requests[-1] | {"total": total}, "peak_bytes": peak_bytes()}

    def limits(self) -> dict[str, Any]:
        """What this machine can do at the moment: a product of two large matrices in bf16, and a copy of memory."""
        found = {"flops_per_s": product_rate(), "bytes_per_s": copy_rate()}
        forget_peak()
        return found


def product_rate() -> float:
    """Floating-point operations per second."""
    import torch

    left, right = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).bfloat16() for _ in range(2))
    return 2 * PRODUCT_SIDE**3 / best_seconds(lambda: torch.matmul(left, right))


def copy_rate() -> float:
    """Bytes that are read and written per second."""
    import torch

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / best_seconds(lambda: target.copy_(source))


def best_seconds(function: Callable[[], object]) -> float:
    """The shortest of five runs after one that does not count."""
    function()
    samples = []
    for _ in range(5):
        begin = time.perf_counter()
        function()
        samples.append(time.perf_counter() - begin)
    return min(samples)


def forget_peak() -> None:
    """Sets the largest memory back to what is held now, where Linux lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    worker = DiffusersWorker()
    serve({name: getattr(worker, name) for name in ("load", "warm_up", "generate", "limits")})
