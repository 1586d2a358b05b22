"""One request in context windows on the device: the engines of a window run in turn, and the host blends them.

Latents and predictions of a window are a few megabytes, so their way to the host and back takes little time beside a
run of the UNet. SparseCtrl's residuals stay on the device.
"""

from contextlib import suppress

import numpy as np

from ..checked_request import CheckedRequest
from ..cpu.sessions import Array
from ..errors import BackendError
from ..format.decoders import DECODERS
from ..loop.previews import latent_colours, previewed_frame
from ..loop.tokenizer import ClipTokenizer, TokenizedPrompt
from ..loop.windows import Window, parts_of
from .buffers import host_array
from .program import control, encode_text, predict
from .request_run import RequestRun


def window_runs(request: CheckedRequest) -> tuple[int, range]:
    """The number of a request's UNet runs, one for each window of each step, and the runs that keyframes guide."""
    counts = [len(windows) for windows in request.windows()]
    controlled = request.controlled_steps
    return sum(counts), range(sum(counts[: controlled.start]), sum(counts[: controlled.stop]))


class WindowsRun(RequestRun):
    """Makes a clip on the engines of a window. The variant counts runs of windows instead of steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runs = [(step, window) for step, windows in enumerate(self.request.windows()) for window in windows]
        self.encoded: tuple[int, ...] | None = None
        self.latent_shape = self.workspace.layout.latent_shape  # of a window, [1, 4, L, H/8, W/8]
        self.outputs: Array

    def frames(self, tokenizer: ClipTokenizer, prompts: list[TokenizedPrompt]) -> Array:
        """Frames uint8 [F, H, W, 3]."""
        nbytes = 4 * int(np.prod(self.latent_shape))
        host = self.cuda.allocate_host(2 * nbytes)
        try:
            self.outputs = host_array(host, (2, *self.latent_shape[1:]), "float32")
            if self.variant.weighted:
                self.give_embeds(prompts, tokenizer([""]))
            with self.stages.timed("inputs"):
                self.write_inputs(prompts)
                self.workspace.inputs.copy_in("input_ids", "coefficients", self.request.steps - 1)
            if self.variant.starts_with_conditioning:
                self.condition()
            return self.decode(self.denoise())
        finally:
            try:
                self.cuda.synchronize()
            finally:
                with suppress(BackendError):  # a lost device fails here too
                    self.cuda.free_host(host)

    def condition(self) -> None:
        """Prompt embeddings, and SparseCtrl's residuals of all windows, if there is memory to keep them."""
        workspace, variant = self.workspace, self.variant
        if not variant.weighted:
            with self.stages.stage("text"):
                for prompt in range(variant.prompts):
                    encode_text(workspace, prompt, workspace.prompt_embeds(variant, prompt))
                self.cuda.synchronize()
                self.stages.report("text", 1)
        if not variant.computes_conditioning:
            return
        self.stages.report("keyframes", 0)
        self.stages.report("keyframes", 1)
        if not variant.stepwise:
            with self.stages.stage("control"):
                in_order = sorted(variant.controlled_steps, key=lambda run: self.places(self.runs[run][1]))
                for done, run in enumerate(in_order, start=1):
                    self.control(run)
                    self.stages.report("control", done)

    def places(self, window: Window) -> tuple[int, ...]:
        """The frames of a window that have a keyframe."""
        return tuple(item.index for item in self.request.keyframes if item.index in window.frames)

    def control(self, run: int) -> None:
        """Runs SparseCtrl for one window at its step; encodes its keyframes if the last window had others."""
        workspace = self.workspace
        step, window = self.runs[run]
        self.write_keyframes(window.frames)
        workspace.inputs.copy_in("pictures", "frame_index", 0)
        if self.variant.source == "rgb" and self.places(window) != self.encoded:
            workspace.enqueue("vae_encoder", image=workspace.at("pictures"), latents=workspace.at("conditioning"))
            self.encoded = self.places(window)
        control(workspace, self.variant, step, run)
        self.cuda.synchronize()  # the next window's keyframes go to the same page-locked memory

    def denoise(self) -> Array:
        """The LCM loop; returns the denoised latents [F, 4, H/8, W/8]."""
        request = self.request
        _, channels, _, height, width = self.latent_shape
        shape = (1, channels, request.frames, height, width)
        latents = self.generator.randn(shape)
        images: Array = latents[0].swapaxes(0, 1)
        done = 0
        self.stages.report("denoise", 0)
        for step in range(request.steps):
            runs = [run for run, (of, _) in enumerate(self.runs) if of == step]
            prediction = self.predict(step, latents, runs)
            with self.stages.timed("denoise"):
                last = step == request.steps - 1
                noise = np.zeros(shape, np.float32) if last else self.generator.randn(shape)
                latents, images = self.update(step, latents, prediction, noise)
            done += len(runs)
            self.stages.report("denoise", done)
            if self.on_preview is not None:
                with self.stages.timed("previews"):
                    frame = self.preview(images, previewed_frame(request.frames))
                self.show(step + 1, frame)
        return images

    def preview(self, images: Array, index: int) -> Array:
        """A frame of the clip that a step predicts: uint8 [H, W, 3], or [H/8, W/8, 3] of latents."""
        if self.variant.preview == "latents":
            return latent_colours(images[index])
        return np.array(self.decode_part(DECODERS["tiny"], images[index : index + 1])[0])

    def predict(self, step: int, latents: Array, runs: list[int]) -> Array:
        """The UNet's prediction [prompts, 4, F, H/8, W/8] at one step, blended from the step's windows."""
        workspace, variant = self.workspace, self.variant
        blended: Array = np.zeros((variant.prompts, *latents.shape[1:]), np.float32)
        for run in runs:
            window = self.runs[run][1]
            if run > runs[0]:
                self.stages.report("denoise", run)
            if variant.stepwise and run in variant.controlled_steps:
                with self.stages.timed("control"):
                    self.control(run)
            with self.stages.timed("denoise"):
                workspace.inputs.array("noise")[:] = latents[:, :, window.frames]
                workspace.inputs.copy_in("noise", "noise", 0)
                predict(workspace, variant, step, run, workspace.at("noise"))
                window.add(self.copied("prediction", variant.prompts), blended)
        return blended

    def copied(self, name: str, count: int = 1) -> Array:
        """The first arrays of a buffer of latents, copied to page-locked memory: [count, 4, L, H/8, W/8]."""
        for index in range(count):
            array = self.outputs[index]
            self.cuda.copy_out(array.ctypes.data, self.workspace.at(name, index), array.nbytes)
        self.cuda.synchronize()
        return self.outputs[:count]

    def update(self, step: int, latents: Array, prediction: Array, noise: Array) -> tuple[Array, Array]:
        """Guidance and the LCM update; returns the next latents [1, 4, F, H/8, W/8] and the images [F, 4, H/8, W/8]."""
        workspace, inputs = self.workspace, self.workspace.inputs
        updated, images = np.empty_like(latents), np.empty_like(latents[0].swapaxes(0, 1))
        for part in parts_of(self.request.frames, self.latent_shape[2]):
            for index, values in enumerate((latents, noise, prediction[:1], prediction[-1:])):
                inputs.array("noise", index)[:] = values[:, :, part]
            inputs.copy_in("noise", "noise", 3)
            workspace.enqueue(
                "lcm_update",
                latents=workspace.at("noise", 0),
                negative=workspace.at("noise", 2),
                positive=workspace.at("noise", 3),
                guidance_scale=workspace.at("guidance_scale"),
                noise=workspace.at("noise", 1),
                coefficients=workspace.at("coefficients", step),
                next_latents=workspace.at("latents"),
                images=workspace.at("images"),
            )
            updated[:, :, part] = self.copied("latents")
            images[part] = self.copied("images").reshape(images[part].shape)
        return updated, images

    def decode(self, images: Array) -> Array:
        """Decodes as many frames at a time as the engine takes; returns uint8 [F, H, W, 3]."""
        request = self.request
        frames: Array = np.empty((request.frames, request.height, request.width, 3), np.uint8)
        decoded = self.workspace.layout.decoded_by(request.decoder_graph)
        with self.stages.stage("decode"):
            for run, part in enumerate(parts_of(request.frames, decoded), start=1):
                frames[part] = self.decode_part(request.decoder_graph, images[part])
                self.stages.report("decode", run)
        return frames

    def decode_part(self, graph: str, images: Array) -> Array:
        """Decodes as many images as the engine takes; returns the page-locked frames, uint8 [n, H, W, 3]."""
        workspace = self.workspace
        workspace.inputs.array("noise").reshape(-1)[: images.size] = images.reshape(-1)
        workspace.inputs.copy_in("noise", "noise", 0)
        workspace.enqueue(graph, latents=workspace.at("noise"), frames=workspace.at("frames"))
        decoded: Array = workspace.frames()[: len(images)]
        self.cuda.copy_out(decoded.ctypes.data, workspace.at("frames"), decoded.nbytes)
        self.cuda.synchronize()
        return decoded
