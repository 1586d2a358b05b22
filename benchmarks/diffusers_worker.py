"""A worker process that makes clips with diffusers on the CPU, plain, compiled or with VAE slicing."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from diffusers_pipeline import generate, load_pipeline, watch_stages
from machine_limits import copy_rate, product_rate
from sparsectrl_lcm.benchmarks.harness.measured_requests import PROMPT, SEED, RequestSize, scribbles
from sparsectrl_lcm.benchmarks.harness.worker_process import serve
from sparsectrl_lcm.runtime.machine import peak_bytes

COMMAND = (sys.executable, __file__)


class DiffusersWorker:
    """Answers `load` first, then `warm_up`, `generate` and `limits`."""

    def __init__(self) -> None:
        self.pipe: Any = None
        self.compiled = False
        self.requests: list[dict[str, float]] = []

    def load(self, checkpoints: str, dtype: str, threads: int, decoder: str) -> dict[str, Any]:
        """Loads the pipeline. `dtype` is the name of a torch dtype; the rest is as for `load_pipeline`."""
        import torch

        torch.set_num_threads(threads)
        self.pipe = load_pipeline(Path(checkpoints), getattr(torch, dtype), decoder)
        for model in (self.pipe.unet, self.pipe.controlnet, self.pipe.vae.decoder):
            self.make_switchable(model)
        self.requests = watch_stages(self.pipe)
        return {"precision": dtype, "threads": torch.get_num_threads()}

    def make_switchable(self, model: Any) -> None:
        """Makes a model run compiled or plain, depending on `self.compiled`."""
        plain = model._call_impl
        model.compile()
        compiled = model._compiled_call_impl

        def call(*arguments: Any, **keywords: Any) -> Any:
            return (compiled if self.compiled else plain)(*arguments, **keywords)

        model._compiled_call_impl = call

    def warm_up(self, save: str | None = None, **request: Any) -> dict[str, Any]:
        """Makes a first request and saves its frames in the file `save`. Compiled models are compiled here."""
        return self.generate(PROMPT, SEED, save=save, **request)

    def generate(
        self,
        prompt: str,
        seed: int,
        compiled: bool = False,
        vae_slicing: bool = False,
        save: str | None = None,
        **size: Any,
    ) -> dict[str, Any]:
        """Makes a clip of a `RequestSize`. Returns the seconds of the request and its stages, and the peak memory.

        The peak is that since the last `switch` with a change, if the system can reset it.
        """
        self.switch(compiled, vae_slicing)
        self.requests.append({})
        request = RequestSize(**size)
        pictures = scribbles(request.width, request.height, request.frames)
        begin = time.perf_counter()
        frames = generate(self.pipe, prompt, seed, request, pictures)
        pixels = (frames * 255).round().astype(np.uint8)
        total = time.perf_counter() - begin
        if save is not None:
            np.save(save, pixels)
        return {"seconds": self.requests[-1] | {"total": total}, "peak_bytes": peak_bytes()}

    def switch(self, compiled: bool, vae_slicing: bool) -> None:
        """Chooses how the next request runs. A change resets the peak memory."""
        if (compiled, vae_slicing) == (self.compiled, self.pipe.vae.use_slicing):
            return
        self.compiled = compiled
        if vae_slicing:
            self.pipe.vae.enable_slicing()
        else:
            self.pipe.vae.disable_slicing()
        forget_peak()

    def limits(self) -> dict[str, Any]:
        """Measures the current limits of this machine."""
        found = {"flops_per_s": product_rate(), "bytes_per_s": copy_rate()}
        forget_peak()
        return found


def forget_peak() -> None:
    """Resets the peak memory of this process to its current memory, if Linux allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    worker = DiffusersWorker()
    serve({name: getattr(worker, name) for name in ("load", "warm_up", "generate", "limits")})
