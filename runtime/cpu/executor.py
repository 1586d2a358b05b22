"""The LCM loop on a backend whose inputs and outputs are arrays in the host's memory."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace

import numpy as np

from ..checked_request import CheckedRequest
from ..errors import BackendError
from ..format.bundle import Bundle
from ..format.clip_layout import ClipLayout, ClipSize, frames_decoded_at_a_time
from ..format.decoders import DECODERS
from ..format.manifest import Manifest
from ..loop.conditioning import (
    Conditioning,
    ConditioningCache,
    Residuals,
    cache_key,
    graphs_of,
    residual_bytes,
    window_feeds,
)
from ..loop.previews import latent_colours, previewed_frame
from ..loop.schedule import Schedule, lcm_schedule
from ..loop.tokenizer import ClipTokenizer
from ..loop.windows import Window, parts_of
from ..progress import OnFrames, OnPreview, OnProgress, Stages
from .conditioning_graphs import encode_prompt, keyframe_feeds, no_residuals, residuals_at
from .sessions import Array, Sessions, split_feeds

DECODE_PIXELS = 256 * 256
"""Pixels that the host decodes at a time, but at least one frame; limits the decoder's memory (docs/cpu.md)."""
TINY = DECODERS["tiny"]
"""The decoder of previews."""


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
        self,
        request: CheckedRequest,
        on_progress: OnProgress | None,
        on_frames: OnFrames | None = None,
        on_preview: OnPreview | None = None,
    ) -> tuple[Array, dict[str, float]]:
        """Frames uint8 [F, H, W, 3], and seconds per stage; `on_frames` gets each part as it is decoded."""
        return _Run(self, request, on_progress, on_frames, on_preview).frames()

    def refit(self, weights: Bundle | None) -> None:
        """Raises BackendError: the graphs read their weights from the bundle's files."""
        reason = f"{self.backend} cannot change the weights of its engines"
        raise BackendError("refit", reason, "load the other bundle instead")

    def check_refit(self, weights: Bundle) -> None:
        """Raises BackendError, as `refit` does."""
        self.refit(weights)

    def open_graph(self, graph: str, size: ClipSize) -> "HostGraph":
        """Opens one graph for clips of a size."""
        return HostGraph(self.sessions, self.manifest, graph, size)

    def in_one_piece(self, size: ClipSize) -> bool:
        """True: the graphs are opened for the frames of each request."""
        return True

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
        on_preview: OnPreview | None,
    ) -> None:
        self.executor = executor
        self.sessions = executor.sessions
        self.manifest = executor.manifest
        self.request = request
        self.on_frames = on_frames
        self.on_preview = on_preview
        self.prompts = executor.tokenizer.prompts(request)
        tokens = max(prompt.input_ids.size for prompt in self.prompts)
        self.windows = request.windows()
        self.layout = request.layout(self.manifest.sizes, DECODE_PIXELS, tokens)
        self.decoded = parts_of(request.frames, self.layout.decoded_by(request.decoder_graph))
        steps = {"load": 1, "text": 1}
        if request.keyframes:
            steps |= {"keyframes": 1, "control": self.control_runs}
        steps |= {"denoise": sum(map(len, self.windows)), "decode": len(self.decoded)}
        self.stages = Stages(steps, on_progress)
        self.report: Callable[[str, int], None] = self.stages.report

    @property
    def has_tiny_decoder(self) -> bool:
        """Whether the bundle has the decoder of previews."""
        return TINY in self.manifest.graphs

    @property
    def control_runs(self) -> int:
        """Number of SparseCtrl's runs: one for each window of each controlled step."""
        return sum(len(self.windows[step]) for step in self.request.controlled_steps)

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
            if self.on_preview is not None and self.has_tiny_decoder:
                self.sessions.open(TINY, self.layout.dimensions(TINY))
            self.report("load", 1)

    def conditioning(self, schedule: Schedule, key: Hashable) -> Conditioning:
        """Computes the conditioning and keeps it under `key`."""
        cache, request = self.executor.cache, self.request
        with self.stages.stage("text"):
            prompt_embeds = encode_prompt(self.sessions, self.executor.tokenizer, self.prompts)
            self.report("text", 1)
        conditioning = Conditioning(prompt_embeds, {})
        if request.keyframes:
            with self.stages.stage("keyframes"):
                conditioning = replace(conditioning, feeds=keyframe_feeds(self.sessions, request))
                self.report("keyframes", 1)
            needed = residual_bytes(self.manifest, self.layout, self.control_runs)
            if cache.reserve(conditioning.nbytes + needed):
                conditioning = replace(conditioning, residuals=self.residuals(schedule, conditioning))
        cache.put(key, conditioning)
        return conditioning

    def residuals(self, schedule: Schedule, conditioning: Conditioning) -> tuple[tuple[Residuals, ...], ...]:
        """Runs SparseCtrl for all windows of all controlled steps, before the loop."""
        steps, done = [], 0
        with self.stages.stage("control"):
            for step in self.request.controlled_steps:
                windows = []
                for window in self.windows[step]:
                    windows.append(self.window_residuals(schedule.timesteps[step], window, conditioning))
                    done += 1
                    self.report("control", done)
                steps.append(tuple(windows))
        return tuple(steps)

    def window_residuals(self, timestep: np.float32, window: Window, conditioning: Conditioning) -> Residuals:
        """Runs SparseCtrl for one window."""
        feeds = window_feeds(conditioning.feeds, window.frames, self.layout.keyframes)
        part = replace(conditioning, feeds=feeds)
        return residuals_at(self.sessions, self.manifest, self.request, part, timestep)

    def residuals_of(self, step: int, place: int, timestep: np.float32, conditioning: Conditioning) -> Residuals:
        """The residuals of a step's window: kept, computed now if they take too much memory to keep, or zeros."""
        controlled = self.request.controlled_steps
        if step not in controlled:
            return no_residuals(self.manifest)
        if conditioning.residuals is not None:
            return conditioning.residuals[step - controlled.start][place]
        with self.stages.timed("control"):
            return self.window_residuals(timestep, self.windows[step][place], conditioning)

    def denoise(self, schedule: Schedule, conditioning: Conditioning) -> Array:
        """The LCM loop; returns the denoised latents [F, 4, H/8, W/8]."""
        request = self.request
        generator = request.noise_source()
        shape = replace(self.layout, clip=request.clip_size).latent_shape
        latents = generator.randn(shape)
        images: Array = latents[0]
        last, done = request.steps - 1, 0
        self.report("denoise", 0)
        for step, coefficients in enumerate(schedule.coefficients):
            prediction = self.predict(step, schedule.timesteps[step], latents, conditioning, done)
            with self.stages.timed("denoise"):
                noise = generator.randn(shape) if step < last else np.zeros(shape, np.float32)
                latents, images = self.update(latents, prediction, noise, coefficients)
            done += len(self.windows[step])
            self.report("denoise", done)
            if self.on_preview is not None:
                index = previewed_frame(request.frames)
                with self.stages.timed("previews"):
                    frame = self.preview(images, index)
                self.on_preview(step + 1, index, frame)
        return images

    def preview(self, images: Array, index: int) -> Array:
        """A frame of the clip that a step predicts: uint8 [H, W, 3], or [H/8, W/8, 3] without the tiny decoder."""
        if not self.has_tiny_decoder:
            return latent_colours(images[index])
        (frames,) = self.sessions.session(TINY).run({"latents": images[index : index + 1]})
        frame: Array = frames[0]
        return frame

    def predict(self, step: int, timestep: np.float32, latents: Array, conditioning: Conditioning, done: int) -> Array:
        """The UNet's prediction [B, 4, F, H/8, W/8] at one step, blended from the step's windows.

        Args:
            step: the step, from 0.
            timestep: its timestep.
            latents: [1, 4, F, H/8, W/8].
            conditioning: the clip's.
            done: windows of the steps before.
        """
        windows = self.windows[step]
        blended: Array = np.zeros((len(self.request.texts), *latents.shape[1:]), np.float32)
        for place, window in enumerate(windows):
            if place:
                self.report("denoise", done + place)
            residuals = self.residuals_of(step, place, timestep, conditioning)
            with self.stages.timed("denoise"):
                (prediction,) = self.sessions.session("unet").run(
                    {
                        "latents": latents[:, :, window.frames],
                        "timestep": np.array([timestep]),
                        "prompt_embeds": conditioning.prompt_embeds,
                        "conditioning_scale": np.array([self.request.conditioning_scale], np.float32),
                        **residuals,
                    }
                )
                if len(windows) == 1:
                    return prediction
                window.add(prediction, blended)
        return blended

    def update(self, latents: Array, prediction: Array, noise: Array, coefficients: Array) -> tuple[Array, Array]:
        """Guidance and the LCM update; returns the next latents [1, 4, F, H/8, W/8] and the images [F, 4, H/8, W/8]."""
        request = self.request
        updated, images = np.empty_like(latents), np.empty_like(latents[0].swapaxes(0, 1))
        for part in parts_of(request.frames, request.window_size.frames):
            updated[:, :, part], images[part] = self.sessions.session("lcm_update").run(
                {
                    "latents": latents[:, :, part],
                    "negative": prediction[:1, :, part],
                    "positive": prediction[-1:, :, part],
                    "guidance_scale": np.array([request.guidance_scale], np.float32),
                    "noise": noise[:, :, part],
                    "coefficients": coefficients,
                }
            )
        return updated, images

    def decode(self, images: Array) -> Array:
        """Decodes the frames part by part; returns uint8 [F, H, W, 3]."""
        request = self.request
        session = self.sessions.session(request.decoder_graph)
        frames = np.empty((request.frames, request.height, request.width, 3), np.uint8)
        told = 0
        with self.stages.stage("decode"):
            for run, part in enumerate(self.decoded, start=1):
                (decoded,) = session.run({"latents": images[part]})
                frames[told : part.stop] = decoded[told - part.start :]
                if self.on_frames is not None:
                    self.on_frames(told, frames[told : part.stop])
                told = part.stop
                self.report("decode", run)
        return frames
