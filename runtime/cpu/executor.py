"""The LCM loop on a backend whose inputs and outputs are arrays in the host's memory."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace

import numpy as np

from ..checked_request import CheckedRequest
from ..errors import BackendError
from ..format.bundle import Bundle
from ..format.clip_layout import ClipLayout, ClipSize, frames_decoded_at_a_time
from ..format.manifest import Manifest
from ..loop.conditioning import (
    Conditioning,
    ConditioningCache,
    Residuals,
    cache_key,
    graphs_of,
    residual_bytes,
)
from ..loop.noise import TorchGenerator
from ..loop.schedule import Schedule, lcm_schedule
from ..loop.tokenizer import ClipTokenizer
from ..progress import OnFrames, OnProgress, Stages
from .conditioning_graphs import encode_prompt, keyframe_feeds, no_residuals, residuals_at
from .sessions import Array, Sessions, split_feeds

DECODE_PIXELS = 256 * 256
"""Pixels that the host decodes at a time, but at least one frame; limits the decoder's memory (docs/cpu.md)."""


class HostExecutor:
    """Runs requests graph by graph."""

    def __init__(self, bundle: Bundle, sessions: Sessions, kept_bytes: int) -> None:
        self.backend = sessions.backend
        self.precision = sessions.precision
        self.sessions = sessions
        self.manifest = bundle.manifest
        self.tokenizer = ClipTokenizer(bundle.tokenizer)
        self.cache = ConditioningCache(kept_bytes)

    def run(
        self, request: CheckedRequest, on_progress: OnProgress | None, on_frames: OnFrames | None = None
    ) -> tuple[Array, dict[str, float]]:
        """Frames uint8 [F, H, W, 3], and seconds per stage; `on_frames` gets each part as it is decoded."""
        return _Run(self, request, on_progress, on_frames).frames()

    def refit(self, weights: Bundle | None) -> None:
        """Raises BackendError: the graphs read their weights from the bundle."""
        raise BackendError("refit", "this backend reads its weights from the bundle", "load the other bundle instead")

    def open_graph(self, graph: str, size: ClipSize) -> "HostGraph":
        """Opens one graph for clips of a size."""
        return HostGraph(self.sessions, self.manifest, graph, size)

    def close(self) -> None:
        """Frees the graphs and all conditionings."""
        self.sessions.close()
        self.cache = ConditioningCache(self.cache.max_bytes)


class HostGraph:
    """One graph, which runs as requests run it: one prompt and one part of the frames at a time."""

    def __init__(self, sessions: Sessions, manifest: Manifest, graph: str, size: ClipSize) -> None:
        decoded = frames_decoded_at_a_time(size, DECODE_PIXELS)
        layout = ClipLayout(
            manifest.sizes, size, keyframes=manifest.keyframe_slots, decoded=decoded, tokens=manifest.max_tokens
        )
        sessions.open(graph, layout.dimensions(graph))
        self._session = sessions.session(graph)
        self._shapes = layout.shapes(graph, manifest.graphs[graph])

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the graph; returns its outputs in order."""
        parts = [self._session.run(part) for part in split_feeds(feeds, self._shapes)]
        return [np.concatenate(outputs) if len(parts) > 1 else outputs[0] for outputs in zip(*parts, strict=True)]

    def close(self) -> None:
        """Does nothing: the executor keeps the graph for its requests."""


class _Run:
    """One request: conditioning, loop, frames."""

    def __init__(
        self,
        executor: HostExecutor,
        request: CheckedRequest,
        on_progress: OnProgress | None,
        on_frames: OnFrames | None,
    ) -> None:
        self.executor = executor
        self.sessions = executor.sessions
        self.manifest = executor.manifest
        self.request = request
        self.on_frames = on_frames
        self.prompts = executor.tokenizer.prompts(request)
        tokens = max(prompt.input_ids.size for prompt in self.prompts)
        self.layout = request.layout(self.manifest.sizes, DECODE_PIXELS, tokens)
        steps = {"load": 1, "text": 1}
        if request.keyframes:
            steps |= {"keyframes": 1, "control": len(request.controlled_steps)}
        steps |= {"denoise": request.steps, "decode": self.layout.decoder_runs}
        self.stages = Stages(steps, on_progress)
        self.report: Callable[[str, int], None] = self.stages.report

    def frames(self) -> tuple[Array, dict[str, float]]:
        with self.stages.timed("total"):
            key = cache_key(self.request)
            kept = self.executor.cache.get(key)
            self.load(kept)
            schedule = lcm_schedule(self.manifest.scheduler, self.request.steps)
            conditioning = kept or self.conditioning(schedule, key)
            images = self.denoise(schedule, conditioning)
            frames = self.decode(images)
        return frames, self.stages.timings

    def load(self, kept: Conditioning | None) -> None:
        """Opens the graphs that the request runs, if they are not open yet."""
        with self.stages.stage("load"):
            for graph in graphs_of(self.request, kept):
                self.sessions.open(graph, self.layout.dimensions(graph))
            self.report("load", 1)

    def conditioning(self, schedule: Schedule, key: Hashable) -> Conditioning:
        """Computes the conditioning and keeps it under `key`."""
        cache, request = self.executor.cache, self.request
        with self.stages.stage("text"):
            prompt_embeds = encode_prompt(self.sessions, self.executor.tokenizer, self.prompts, request.clip_skip)
            self.report("text", 1)
        conditioning = Conditioning(prompt_embeds, {})
        if request.keyframes:
            with self.stages.stage("keyframes"):
                conditioning = replace(conditioning, feeds=keyframe_feeds(self.sessions, request))
                self.report("keyframes", 1)
            needed = residual_bytes(self.manifest, self.layout, len(request.controlled_steps))
            if cache.reserve(conditioning.nbytes + needed):
                conditioning = replace(conditioning, residuals=self.residuals(schedule, conditioning))
        cache.put(key, conditioning)
        return conditioning

    def residuals(self, schedule: Schedule, conditioning: Conditioning) -> tuple[Residuals, ...]:
        """Runs SparseCtrl for all controlled steps, before the loop."""
        residuals = []
        controlled = self.request.controlled_steps
        with self.stages.stage("control"):
            for step, timestep in enumerate(schedule.timesteps[controlled.start : controlled.stop], start=1):
                residuals.append(residuals_at(self.sessions, self.manifest, self.request, conditioning, timestep))
                self.report("control", step)
        return tuple(residuals)

    def residuals_of(self, step: int, timestep: np.float32, conditioning: Conditioning) -> Residuals:
        """The residuals of one step: kept, computed now if they take too much memory to keep, or zeros."""
        controlled = self.request.controlled_steps
        if step not in controlled:
            return no_residuals(self.manifest)
        if conditioning.residuals is not None:
            return conditioning.residuals[step - controlled.start]
        with self.stages.timed("control"):
            return residuals_at(self.sessions, self.manifest, self.request, conditioning, timestep)

    def denoise(self, schedule: Schedule, conditioning: Conditioning) -> Array:
        """The LCM loop; returns the denoised latents [F, 4, H/8, W/8]."""
        request = self.request
        generator = TorchGenerator(request.seed)
        shape = self.layout.latent_shape
        latents = generator.randn(shape)
        images: Array = latents[0]
        last = request.steps - 1
        self.report("denoise", 0)
        for step, (timestep, coefficients) in enumerate(zip(schedule.timesteps, schedule.coefficients, strict=True)):
            residuals = self.residuals_of(step, timestep, conditioning)
            with self.stages.timed("denoise"):
                (prediction,) = self.sessions.session("unet").run(
                    {
                        "latents": latents,
                        "timestep": np.array([timestep]),
                        "prompt_embeds": conditioning.prompt_embeds,
                        "conditioning_scale": np.array([request.conditioning_scale], np.float32),
                        **residuals,
                    }
                )
                latents, images = self.sessions.session("lcm_update").run(
                    {
                        "latents": latents,
                        "negative": prediction[:1],
                        "positive": prediction[-1:],
                        "guidance_scale": np.array([request.guidance_scale], np.float32),
                        "noise": generator.randn(shape) if step < last else np.zeros(shape, np.float32),
                        "coefficients": coefficients,
                    }
                )
            self.report("denoise", step + 1)
        return images

    def decode(self, images: Array) -> Array:
        """Decodes the frames part by part; returns uint8 [F, H, W, 3]."""
        request = self.request
        session = self.sessions.session(request.decoder_graph)
        frames = np.empty((request.frames, request.height, request.width, 3), np.uint8)
        with self.stages.stage("decode"):
            for run, start in enumerate(range(0, request.frames, self.layout.decoded), start=1):
                part = slice(start, start + self.layout.decoded)
                (frames[part],) = session.run({"latents": images[part]})
                if self.on_frames is not None:
                    self.on_frames(start, frames[part])
                self.report("decode", run)
        return frames
