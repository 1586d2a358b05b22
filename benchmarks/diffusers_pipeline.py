"""diffusers' pipeline for AnimateDiff with SparseCtrl and LCM, its requests, and the seconds of their stages."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparsectrl_lcm.benchmarks.harness.measured_requests import RequestSize


def load_pipeline(checkpoints: Path, dtype: Any = None, decoder: str = "full") -> Any:
    """Loads the pipeline from the checkpoints of models.py, assembled as in diffusers' documentation.

    Args:
        checkpoints: folder of the checkpoints.
        dtype: a torch dtype; None for fp32.
        decoder: full for AutoencoderKL, tiny for AutoencoderTiny.
    """
    from diffusers import (
        AnimateDiffSparseControlNetPipeline,
        AutoencoderKL,
        AutoencoderTiny,
        DDIMScheduler,
        LCMScheduler,
        MotionAdapter,
        SparseControlNetModel,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    base = checkpoints / "base"
    given = {} if dtype is None else {"torch_dtype": dtype}
    vaes = {"full": (AutoencoderKL, base / "vae"), "tiny": (AutoencoderTiny, checkpoints / "tiny_decoder")}
    vae_class, vae_folder = vaes[decoder]
    pipe = AnimateDiffSparseControlNetPipeline(
        vae=vae_class.from_pretrained(vae_folder, **given),
        text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder", **given),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(base / "unet", **given),
        motion_adapter=MotionAdapter.from_pretrained(checkpoints / "motion_adapter", **given),
        controlnet=SparseControlNetModel.from_pretrained(checkpoints / "scribble", **given),
        scheduler=LCMScheduler.from_config(DDIMScheduler.load_config(base / "scheduler"), beta_schedule="linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, prompt: str, seed: int, size: RequestSize, keyframes: Mapping[int, NDArray[np.uint8]]
) -> NDArray[np.float32]:
    """Makes a clip: frames [F, H, W, 3] between 0 and 1.

    Args:
        pipe: pipeline from `load_pipeline`.
        prompt: the prompt.
        seed: seed of the noise, which is drawn on the CPU.
        size: size of the request.
        keyframes: scribbles by frame index, each uint8 [H, W, 3].
    """
    import torch
    from PIL import Image

    clip = pipe(
        prompt,
        negative_prompt="",
        num_inference_steps=size.steps,
        guidance_scale=size.guidance,
        conditioning_frames=[Image.fromarray(picture) for picture in keyframes.values()],
        controlnet_frame_indices=list(keyframes),
        num_frames=size.frames,
        width=size.width,
        height=size.height,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
    )
    frames: NDArray[np.float32] = clip.frames[0]
    return frames


def watch_stages(pipe: Any, synchronize: Callable[[], None] = lambda: None) -> list[dict[str, float]]:
    """Times the stages of later requests. Append an empty dict to the result before each request, which fills it.

    Models are timed around their compiled call, so that torch.compile does not trace the clock.

    Args:
        pipe: pipeline from `load_pipeline`.
        synchronize: waits until the device has finished its work.
    """
    requests: list[dict[str, float]] = []

    def timed(stage: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            synchronize()
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            synchronize()
            requests[-1][stage] = requests[-1].get(stage, 0.0) + time.perf_counter() - begin
            return result

        return call

    pipe.encode_prompt = timed("text", pipe.encode_prompt)
    pipe.prepare_image = timed("keyframes", pipe.prepare_image)
    for stage, model in (("control", pipe.controlnet), ("denoise", pipe.unet)):
        model._compiled_call_impl = timed(stage, model._compiled_call_impl or model._call_impl)
    pipe.decode_latents = timed("decode", pipe.decode_latents)
    return requests
