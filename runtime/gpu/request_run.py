"""One request on the device: inputs, noise, plain run or replay, progress, and the proof of new CUDA graphs."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..checked_request import CheckedRequest
from ..cpu.sessions import Array
from ..loop.noise import TorchGenerator
from ..loop.schedule import lcm_schedule
from ..loop.tokenizer import ClipTokenizer
from ..progress import Stages
from .cuda import Cuda
from .program import Variant, noise_at_start
from .workspace import Workspace


class RequestRun:
    """Copies a request's inputs to the device, runs its work, and copies the frames back.

    Attributes:
        conditioning_is_whole: whether the conditioning area holds what the request computed; not after a failed proof.
        replayed: whether the frames came from a replayed CUDA graph.
    """

    def __init__(
        self, workspace: Workspace, cuda: Cuda, request: CheckedRequest, variant: Variant, stages: Stages
    ) -> None:
        self.workspace = workspace
        self.cuda = cuda
        self.request = request
        self.variant = variant
        self.stages = stages
        self.generator = TorchGenerator(request.seed)
        self.conditioning_is_whole = True
        self.replayed = False

    def frames(self, tokenizer: ClipTokenizer) -> Array:
        """Frames uint8 [F, H, W, 3]; captures and proves CUDA graphs for later requests of this variant."""
        workspace, variant = self.workspace, self.variant
        try:
            with self.stages.timed("inputs"):
                self.write_inputs(tokenizer)
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

    def write_inputs(self, tokenizer: ClipTokenizer) -> None:
        """Writes the request's inputs, except for keyframes and noise, to page-locked memory."""
        request, inputs = self.request, self.workspace.inputs
        schedule = lcm_schedule(self.workspace.bundle.manifest.scheduler, request.steps)
        for index, ids in enumerate(tokenizer(request.texts)):
            inputs.array("input_ids", index)[:] = ids
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
        """Reports each unit of work when the device has finished it."""
        workspace = self.workspace
        started: set[str] = set()
        for index, (stage, step) in enumerate(workspace.units[self.variant], start=1):
            if stage not in started:
                started.add(stage)
                self.stages.report(stage, 0)
            self.cuda.wait(workspace.event(index))
            self.stages.report(stage, step)

    def add_seconds(self) -> None:
        """Adds the device's seconds to their stages, after all work is done."""
        workspace = self.workspace
        for index, (stage, _) in enumerate(workspace.units[self.variant], start=1):
            self.stages.add(stage, self.cuda.seconds(workspace.event(index - 1), workspace.event(index)))
