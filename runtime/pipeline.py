"""Keyframes and a prompt in, a clip out."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .bundle import Bundle
from .clip import Clip
from .conditioning import (
    KEPT_BYTES,
    Conditioning,
    ConditioningCache,
    Residuals,
    cache_key,
    encode_prompt,
    graphs_of,
    keyframe_feeds,
    residual_bytes,
    residuals_at,
)
from .errors import Cancelled
from .noise import TorchGenerator
from .request import Keyframe, Request, validate
from .schedule import Schedule, lcm_schedule
from .sessions import Array, Backend, open_backend
from .tokenizer import ClipTokenizer

DECODE_PIXELS = 512 * 512
"""Pixels that are decoded at a time, at least one frame; bounds the memory of the decoder."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is: `step` of `steps` of `stage` are done, `fraction` of the whole.

    A stage (load, text, keyframes, control, denoise, decode) begins with step 0. One that is kept from an earlier
    request is left out, as is `control` where SparseCtrl runs step by step within `denoise`.
    """

    stage: str
    step: int
    steps: int
    fraction: float


OnProgress = Callable[[Progress], Any]
"""Called at the start of each stage and after each unit of its work; returning False cancels the request."""


class VideoPipeline:
    """AnimateDiff with SparseCtrl and LCM on one backend. Not safe for use by several threads at once."""

    def __init__(self, bundle: Bundle, backend: Backend, kept_bytes: int = KEPT_BYTES) -> None:
        self.bundle = bundle
        self.backend = backend
        self._tokenizer = ClipTokenizer(bundle.tokenizer)
        self._cache = ConditioningCache(kept_bytes)

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        *,
        kept_bytes: int = KEPT_BYTES,
    ) -> "VideoPipeline":
        """Opens a bundle.

        Args:
            bundle: the folder that `sparsectrl-lcm export` wrote; None is the demo bundle of the package.
            backend: auto or onnxruntime.
            kept_bytes: memory for what a later request with the same prompt and keyframes uses again, foremost
                SparseCtrl's residuals; a request with larger ones computes them step by step.

        Raises:
            BundleError: the bundle is missing, damaged or of another version.
            BackendError: the backend cannot run here.
        """
        opened = Bundle.load(bundle)
        return cls(opened, open_backend(opened, backend), kept_bytes)

    def generate(
        self,
        prompt: str,
        keyframes: Sequence[Keyframe] = (),
        controlnet: str = "scribble",
        negative_prompt: str = "",
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Clip:
        """Makes a clip.

        Args:
            prompt: what the clip shows; cut to 77 tokens.
            keyframes: at most three, in any order. Without any the clip is AnimateDiff's own.
            controlnet: what the keyframes are, `scribble` (white lines on black) or `rgb` (pictures).
            negative_prompt: what it does not show; used when guidance is on.
            num_inference_steps: LCM steps, 1 to 12.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); on above 1.
            seed: 0 to 2**64 - 1; drawn at random when None. The noise is torch's CPU generator's.
            height, width: pixels; None takes the bundle's own.
            num_frames: 1 to 32; None takes the bundle's own.
            on_progress: called with a `Progress`; returning False cancels.

        Raises:
            InvalidRequest: a value is not allowed; nothing was computed.
            Cancelled: `on_progress` returned False.
            BackendError: the backend failed.
        """
        request = validate(
            self.bundle.manifest,
            prompt=prompt,
            keyframes=keyframes,
            controlnet=controlnet,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            height=height,
            width=width,
            num_frames=num_frames,
        )
        return _Run(self, request, on_progress).clip()


class _Run:
    """One request on its way: conditioning, loop, frames."""

    def __init__(self, pipeline: VideoPipeline, request: Request, on_progress: OnProgress | None) -> None:
        self.pipeline = pipeline
        self.backend = pipeline.backend
        self.manifest = pipeline.bundle.manifest
        self.request = request
        self.on_progress = on_progress
        self.timings: dict[str, float] = {}
        self.chunk = max(1, DECODE_PIXELS // (request.height * request.width))
        self.stages = {"load": 1, "text": 1}
        if request.keyframes:
            self.stages |= {"keyframes": 1, "control": request.steps}
        self.stages |= {"denoise": request.steps, "decode": -(-request.frames // self.chunk)}

    def clip(self) -> Clip:
        start = time.perf_counter()
        self.load()
        schedule = lcm_schedule(self.manifest.scheduler, self.request.steps)
        conditioning = self.conditioning(schedule)
        latents = self.denoise(schedule, conditioning)
        frames = self.decode(latents)
        self.timings["total"] = time.perf_counter() - start
        return Clip(frames=frames, seed=self.request.seed, timings=self.timings, keyframes=self.request.keyframes)

    def load(self) -> None:
        """Opens the graphs of the request where they are not open yet."""
        with self.stage("load"):
            for graph in graphs_of(self.request):
                self.backend.session(graph)
            self.report("load", 1)

    def conditioning(self, schedule: Schedule) -> Conditioning:
        cache, key, request = self.pipeline._cache, cache_key(self.request), self.request
        if (kept := cache.get(key)) is not None:
            return kept
        with self.stage("text"):
            prompt_embeds = encode_prompt(self.backend, self.pipeline._tokenizer, request)
            self.report("text", 1)
        conditioning = Conditioning(prompt_embeds, {})
        if request.keyframes:
            with self.stage("keyframes"):
                conditioning = replace(conditioning, feeds=keyframe_feeds(self.backend, request))
                self.report("keyframes", 1)
            if cache.reserve(conditioning.nbytes + residual_bytes(self.manifest, request)):
                conditioning = replace(conditioning, residuals=self.residuals(schedule, conditioning))
        cache.put(key, conditioning)
        return conditioning

    def residuals(self, schedule: Schedule, conditioning: Conditioning) -> tuple[Residuals, ...]:
        """SparseCtrl for all steps, ahead of the loop."""
        residuals = []
        with self.stage("control"):
            for step, timestep in enumerate(schedule.timesteps, start=1):
                residuals.append(residuals_at(self.backend, self.manifest, self.request, conditioning, timestep))
                self.report("control", step)
        return tuple(residuals)

    def denoise(self, schedule: Schedule, conditioning: Conditioning) -> Array:
        """The LCM loop; latents [1, 4, F, h, w]."""
        request, sizes = self.request, self.manifest.sizes
        generator = TorchGenerator(request.seed)
        factor = sizes.vae_scale_factor
        shape = (1, sizes.latent_channels, request.frames, request.height // factor, request.width // factor)
        latents = generator.randn(shape)
        guidance_scale = np.array([request.guidance_scale], np.float32)
        last = request.steps - 1
        self.report("denoise", 0)
        for step, (timestep, coefficients) in enumerate(zip(schedule.timesteps, schedule.coefficients, strict=True)):
            if conditioning.residuals is not None:
                residuals = conditioning.residuals[step]
            else:  # beyond the memory bound, or zeros
                with self.timed("control" if request.keyframes else "denoise"):
                    residuals = residuals_at(self.backend, self.manifest, request, conditioning, timestep)
            with self.timed("denoise"):
                noise = generator.randn(shape) if step < last else np.zeros(shape, np.float32)
                latents, _ = self.backend.session("unet").run(
                    {
                        "latents": latents,
                        "timestep": np.array([timestep]),
                        "prompt_embeds": conditioning.prompt_embeds,
                        "guidance_scale": guidance_scale,
                        "noise": noise,
                        "coefficients": coefficients,
                        **residuals,
                    }
                )
            self.report("denoise", step + 1)
        return latents

    def decode(self, latents: Array) -> Array:
        """Frames uint8 [F, H, W, 3], a bounded number of them at a time."""
        request = self.request
        frames = np.empty((request.frames, request.height, request.width, 3), np.uint8)
        images = np.ascontiguousarray(latents[0].transpose(1, 0, 2, 3))  # [F, 4, h, w]
        with self.stage("decode"):
            for chunk, start in enumerate(range(0, request.frames, self.chunk), start=1):
                part = slice(start, start + self.chunk)
                (frames[part],) = self.backend.session("vae_decoder").run({"latents": images[part]})
                self.report("decode", chunk)
        return frames

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.report(name, 0)
        with self.timed(name):
            yield

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start

    def report(self, stage: str, step: int) -> None:
        """Tells how many units of a stage are done; a request can be cancelled here."""
        if self.on_progress is None:
            return
        names = list(self.stages)
        before = sum(self.stages[name] for name in names[: names.index(stage)])
        progress = Progress(stage, step, self.stages[stage], (before + step) / sum(self.stages.values()))
        if self.on_progress(progress) is False:
            raise Cancelled(f"cancelled after {stage} {step} of {self.stages[stage]}")
