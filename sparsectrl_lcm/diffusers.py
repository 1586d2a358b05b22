"""A pipeline that is called as diffusers' `AnimateDiffSparseControlNetPipeline` is.

diffusers is not imported, and torch only if the caller's arguments or output need it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from .diffusers_arguments import (
    CallbackTensors,
    TorchNoise,
    in_words_of_diffusers,
    keyframes,
    one_prompt,
    refuse,
    refuse_method,
)
from .runtime import Clip, ClipRequest, InvalidRequest, Progress, VideoPipeline


class SparseCtrlLcmOutput(NamedTuple):
    """The result of a call.

    Attributes:
        frames: a list of lists of Pillow images for `pil`, an array [1, F, H, W, 3] for `np`, or a tensor
            [1, F, 3, H, W] for `pt`; both float32 in 0..1.
    """

    frames: Any


class SparseCtrlLcmPipeline:
    """Takes the arguments of diffusers' `AnimateDiffSparseControlNetPipeline`; refuses by name what it cannot do.

    Args:
        pipeline: makes the clips.
        controlnet: what the conditioning frames are.
    """

    def __init__(self, pipeline: VideoPipeline, controlnet: Literal["scribble", "rgb"] = "scribble") -> None:
        self.pipeline = pipeline
        self.controlnet = controlnet

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | os.PathLike[str] | None = None,
        *,
        controlnet: Literal["scribble", "rgb"] = "scribble",
        backend: str = "auto",
        **options: Any,
    ) -> "SparseCtrlLcmPipeline":
        """Opens a bundle: the folder that `sparsectrl-lcm export` wrote.

        Args:
            bundle, backend, options: as for `VideoPipeline.load`.
            controlnet: what the conditioning frames are.
        """
        return cls(VideoPipeline.load(bundle, backend, **options), controlnet)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 16,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        conditioning_frames: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_conditioning_scale: float = 1.0,
        controlnet_frame_indices: Sequence[int] = (0,),
        guess_mode: bool = False,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> SparseCtrlLcmOutput | tuple[Any]:
        """Makes a clip.

        The arguments have diffusers' meaning; `eta` is ignored, as by its `LCMScheduler`. The defaults of
        `num_inference_steps` and `guidance_scale` are those of LCM.

        Args:
            prompt, negative_prompt: text, or a list of one text.
            height, width: pixels; the bundle's by default.
            num_frames, num_inference_steps, guidance_scale, clip_skip: as for `VideoPipeline.generate`.
            generator: a `torch.Generator` on the CPU, whose noise is used; afterwards it is in the state in which
                diffusers leaves it. None takes torch's own generator if torch is imported, or else a random seed.
            conditioning_frames: Pillow images, which are stretched to the clip's size, arrays [H, W, 3] or
                [1, H, W, 3], or tensors [3, H, W] or [1, 3, H, W], of this size. Values are rounded to levels of 255.
            controlnet_frame_indices: the frames that they show.
            output_type: `pil`, `np` or `pt`.
            return_dict: False returns a plain tuple.
            controlnet_conditioning_scale: factor on SparseCtrl's residuals.
            callback_on_step_end: called with this pipeline, the step, its timestep and a dict without tensors.

        Raises:
            InvalidRequest: an argument is not allowed, or cannot be fulfilled here.
            BackendError: the backend failed.
        """
        refuse(
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            cross_attention_kwargs=cross_attention_kwargs,
            guess_mode=guess_mode or None,
            num_videos_per_prompt=None if num_videos_per_prompt == 1 else num_videos_per_prompt,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs or None,
        )
        if output_type not in ("pil", "np", "pt"):
            raise InvalidRequest("output_type", f"{output_type!r} is not allowed", "allowed are pil, np, pt")
        width, height = width or self.pipeline.width, height or self.pipeline.height
        noise = TorchNoise.of(generator)
        request = ClipRequest(
            one_prompt("prompt", prompt),
            keyframes(conditioning_frames, controlnet_frame_indices, num_frames, width, height),
            self.controlnet,
            "" if negative_prompt is None else one_prompt("negative_prompt", negative_prompt),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=None if noise is None else noise.seed,
            height=height,
            width=width,
            num_frames=num_frames,
            conditioning_scale=controlnet_conditioning_scale,
            clip_skip=clip_skip or 0,
        )
        on_progress = callback_on_step_end and self._steps(callback_on_step_end, num_inference_steps)
        try:
            clip = self.pipeline.run(request, on_progress, noise=None if noise is None else noise.start)
        except InvalidRequest as error:
            raise in_words_of_diffusers(error) from None
        if noise is not None:
            noise.finish()
        output = SparseCtrlLcmOutput(_frames(clip, output_type))
        return output if return_dict else tuple(output)

    def _steps(self, callback: Callable[..., Any], steps: int) -> Callable[[Progress], None]:
        """What calls the callback once after each step."""
        called = 0

        def report(progress: Progress) -> None:
            nonlocal called
            if progress.stage != "denoise":
                return
            from .runtime.loop.schedule import lcm_timesteps

            timesteps = lcm_timesteps(self.pipeline.bundle.manifest.scheduler, steps)
            while called < progress.step * steps // progress.steps:  # a step of a long clip has several units
                changed = callback(self, called, int(timesteps[called]), CallbackTensors())
                called += 1
                if changed:
                    raise InvalidRequest("callback_on_step_end", "it returns tensors", "return the dict that it gets")

        return report

    def __getattr__(self, name: str) -> Any:
        """Methods of diffusers' pipeline that have no meaning here: they refuse to be called."""
        return refuse_method(type(self).__name__, name)


def _frames(clip: Clip, output_type: str) -> Any:
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in clip.frames]]
    frames = cast(Any, clip.frames.astype(np.float32) / 255)[None]  # [1, F, H, W, 3]
    if output_type == "np":
        return frames
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3)))
