"""One request on the device: inputs, noise, plain run or replay, progress, and the proof of new CUDA graphs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checked_request import CheckedRequest
from ..cpu.sessions import Array
from ..loop.previews import previewed_frame
from ..loop.prompt_embeds import encode_prompts
from ..loop.schedule import lcm_schedule
from ..loop.tokenizer import ClipTokenizer, TokenizedPrompt
from ..progress import OnPreview, Stages
from .buffers import from_type, to_type
from .cuda import Cuda
from .program import Variant, encode_text, noise_at_start
from .workspace import GIVEN_EMBEDS, Workspace


@dataclass(eq=False)
class RequestRun:
    """Copies a request's inputs to the device, runs its work, and copies the frames back.

    Attributes:
        workspace: the engines and buffers of the size.
        cuda: the stream.
        request: what to make.
        variant: the properties of the request that decide which engines run.
        stages: get the progress.
        on_preview: gets the previews, if the variant has them.
        conditioning_is_whole: whether the conditioning area holds what the request computed; not after a failed proof.
        replayed: whether the frames came from a replayed CUDA graph.
    """

    workspace: Workspace
    cuda: Cuda
    request: CheckedRequest
    variant: Variant
    stages: Stages
    on_preview: OnPreview | None

    def __post_init__(self) -> None:
        self.generator = self.request.noise_source()
        self.conditioning_is_whole = True
        self.replayed = False

    def frames(self, tokenizer: ClipTokenizer, prompts: list[TokenizedPrompt]) -> Array:
        """Frames uint8 [F, H, W, 3]; captures and proves CUDA graphs for later requests of this variant."""
        workspace, variant = self.workspace, self.variant
        try:
            if variant.weighted:
                self.give_embeds(prompts, tokenizer([""]))
            with self.stages.timed("inputs"):
                self.write_inputs(prompts)
                if variant.computes_conditioning:
                    self.write_keyframes(np.arange(self.request.frames))
                first = "pictures" if variant.computes_conditioning else "input_ids"
                workspace.inputs.copy_in(first, "coefficients", variant.steps - 1)
                self.supply(noise_at_start(variant))
            self.replayed = workspace.graphs.replay(variant, self.supply)
            if not self.replayed:
                workspace.enqueue_all(variant, self.supply)
            workspace.copy_frames_out()
            frames: Array = np.empty_like(workspace.frames())
            frames.fill(0)  # maps the new pages while the device works
            self.follow()
        finally:
            self.cuda.synchronize()
        self.add_seconds()
        frames[:] = workspace.frames()
        if not self.replayed and workspace.capturable and workspace.graphs.wants(variant):
            with self.stages.timed("capture"):
                workspace.graphs.capture(
                    variant,
                    lambda between: workspace.enqueue_all(variant, between),
                    lambda launch: self.difference(frames, launch),
                )
        return frames

    def difference(self, frames: Array, launch: Callable[[], None]) -> str:
        """Launches the request's graphs on the inputs that are still on the device; says how the frames differ."""
        self.conditioning_is_whole = False
        try:
            self.workspace.scrub(self.variant)
            launch()
            self.workspace.copy_frames_out()
        finally:
            self.cuda.synchronize()
        replayed = self.workspace.frames()
        if np.array_equal(frames, replayed):
            self.conditioning_is_whole = True
            return ""
        off = np.abs(replayed.astype(np.int16) - frames)
        return f"{np.count_nonzero(off)} of {off.size} values, by up to {off.max()} levels"

    def give_embeds(self, prompts: list[TokenizedPrompt], empty: Array) -> None:
        """Computes the embeddings of prompts with weights, outside of CUDA graphs, and copies them to the device.

        Args:
            prompts: the prompts, each of one chunk.
            empty: the tokens of an empty prompt, int64 [1, 77].
        """
        inputs = self.workspace.inputs
        dtype = inputs.block.tensors[GIVEN_EMBEDS].dtype

        def encode(input_ids: Array, attention_mask: Array, clip_skip: int) -> Array:
            embeds = []
            inputs.array("clip_skip")[:] = clip_skip
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                inputs.array("input_ids")[:], inputs.array("attention_mask")[:] = ids, mask
                inputs.copy_in("input_ids", "clip_skip", 0)
                encode_text(self.workspace, 0, inputs.at(GIVEN_EMBEDS))
                inputs.copy_out(GIVEN_EMBEDS)
                self.cuda.synchronize()
                embeds.append(from_type(inputs.array(GIVEN_EMBEDS), dtype).astype(np.float32))
            return np.concatenate(embeds)

        with self.stages.stage("text"):
            for index, values in enumerate(encode_prompts(prompts, empty, encode)):
                inputs.array(GIVEN_EMBEDS, index)[:] = to_type(values, dtype)
            inputs.copy_in(GIVEN_EMBEDS, GIVEN_EMBEDS, len(prompts) - 1)
            self.stages.report("text", 1)

    def write_inputs(self, prompts: list[TokenizedPrompt]) -> None:
        """Writes the request's inputs, except for keyframes and noise, to page-locked memory."""
        request, inputs = self.request, self.workspace.inputs
        schedule = lcm_schedule(self.workspace.bundle.manifest.scheduler, request.steps)
        for index, prompt in enumerate(prompts):
            inputs.array("input_ids", index)[:] = prompt.input_ids
            inputs.array("clip_skip", index)[:] = prompt.clip_skip
        inputs.array("attention_mask")[:] = 1
        inputs.array("guidance_scale")[:] = request.guidance_scale
        inputs.array("conditioning_scale")[:] = request.conditioning_scale
        for step in range(request.steps):
            inputs.array("timestep", step)[:] = schedule.timesteps[step]
            inputs.array("coefficients", step)[:] = schedule.coefficients[step]

    def write_keyframes(self, frames: NDArray[np.int64]) -> None:
        """Writes SparseCtrl's inputs for some frames of the clip, and their keyframes, to page-locked memory."""
        inputs = self.workspace.inputs
        pictures, mask, index = (inputs.array(name) for name in ("pictures", "conditioning_mask", "frame_index"))
        pictures[:] = 0
        mask[:] = 0
        index[:] = len(mask) - 1
        inside = [keyframe for keyframe in self.request.keyframes if keyframe.index in frames]
        for place, keyframe in enumerate(inside):
            pictures[place], mask[place] = keyframe.pixels, 1
            index[frames == keyframe.index] = place

    def supply(self, noise: range) -> None:
        """Draws arrays of noise and copies them to the device. The device works on what was launched before."""
        if not noise:
            return
        inputs = self.workspace.inputs
        for step in noise:
            array = inputs.array("noise", step)
            self.generator.randn(array.shape, array)
        inputs.copy_in("noise", "noise", noise[-1], noise[0])

    def follow(self) -> None:
        """Reports each unit of work when the device has finished it, and shows the previews."""
        workspace = self.workspace
        started: set[str] = set()
        for index, (stage, step) in enumerate(workspace.units[self.variant], start=1):
            if stage == "previews":
                self.cuda.wait(workspace.event(index))
                self.show(step, workspace.previews.frame(self.variant.preview, step - 1))
                continue
            if stage not in started:
                started.add(stage)
                self.stages.report(stage, 0)
            self.cuda.wait(workspace.event(index))
            self.stages.report(stage, step)

    def show(self, step: int, preview: Array) -> None:
        """Gives the caller the preview of a step, counted from 1."""
        if self.on_preview is not None:
            self.on_preview(step, previewed_frame(self.request.frames), preview)

    def add_seconds(self) -> None:
        """Adds the device's seconds to their stages, after all work is done."""
        workspace = self.workspace
        for index, (stage, _) in enumerate(workspace.units[self.variant], start=1):
            self.stages.add(stage, self.cuda.seconds(workspace.event(index - 1), workspace.event(index)))
