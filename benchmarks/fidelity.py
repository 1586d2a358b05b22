"""Compares the demo bundle's frames and noise with those of diffusers and torch.

    python benchmarks/fidelity.py

Makes a request of the demo model with scribbles and with pictures as keyframes. Compares each with stock diffusers, and
with diffusers and the temporal norm of the original AnimateDiff code, which the bundle was exported for. Pictures are
also compared with a draw from the VAE's posterior instead of its mode. Takes about a minute and writes a JSON file into
benchmarks/results/.
"""

import json
from pathlib import Path
from typing import Any

import diffusers.pipelines.animatediff.pipeline_animatediff_sparsectrl as sparsectrl
import numpy as np
import reports
import torch
from diffusers import AnimateDiffSparseControlNetPipeline, LCMScheduler, MotionAdapter, SparseControlNetModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from PIL import Image
from sparsectrl_lcm.runtime.loop.noise import TorchGenerator
from sparsectrl_lcm.runtime.machine import report_head

from sparsectrl_lcm import Keyframe, VideoPipeline

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "demo" / "trained"
PROMPT, SEED, SIDE = "a yellow star moves up and right over a navy ground", 42, 128
NOISE_SEEDS, NOISE_SHAPE = range(20), (1, 4, 16, 64, 64)
draw_from_posterior = sparsectrl.retrieve_latents


class PerFrame(torch.nn.Module):
    """The temporal GroupNorm of the original AnimateDiff code: statistics of each frame. Takes [B, C, F, h, w]."""

    def __init__(self, norm: torch.nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.norm(frame) for frame in states.unbind(2)], dim=2)


def diffusers_frames(controlnet: str, keyframes: dict[int, Image.Image], norm: str, mode: bool) -> np.ndarray:
    """diffusers' frames of the request, int [F, H, W, 3].

    Args:
        controlnet: scribble or rgb.
        keyframes: pictures by frame.
        norm: whether the temporal norm has statistics of each `frame` or of the whole `clip`.
        mode: whether rgb keyframes are encoded as the mode of the VAE's posterior, instead of a draw from it.
    """
    sparsectrl.retrieve_latents = lambda output, *_: draw_from_posterior(
        output, sample_mode="argmax" if mode else "sample"
    )
    pipe = AnimateDiffSparseControlNetPipeline.from_pretrained(
        TRAINED / "base",
        motion_adapter=MotionAdapter.from_pretrained(TRAINED / "motion_adapter"),
        controlnet=SparseControlNetModel.from_pretrained(TRAINED / controlnet),
    )
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    if norm == "frame":
        for model in (pipe.unet, pipe.controlnet):
            for module in model.modules():
                if isinstance(module, AnimateDiffTransformer3D):
                    module.norm = PerFrame(module.norm)
    torch.manual_seed(SEED)  # a draw from the posterior uses this generator
    frames = pipe(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=1.0,
        conditioning_frames=list(keyframes.values()),
        controlnet_frame_indices=list(keyframes),
        num_frames=16,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).frames[0]
    return (frames * 255).round().astype(int)


def noise() -> dict[str, float]:
    """The share of noise values that are bit-equal to torch's, and the largest difference of the others."""
    pairs = [
        (torch.randn(NOISE_SHAPE, generator=torch.Generator("cpu").manual_seed(seed)).numpy(), TorchGenerator(seed))
        for seed in NOISE_SEEDS
    ]
    drawn = [(theirs, generator.randn(NOISE_SHAPE)) for theirs, generator in pairs]
    return {
        "equal": float(np.mean([(theirs == ours).mean() for theirs, ours in drawn])),
        "largest": float(max(np.abs(theirs - ours).max() for theirs, ours in drawn)),
    }


def main() -> None:
    """Compares, prints and writes."""
    pipeline = VideoPipeline.load(backend="onnxruntime")
    paths = {index: ROOT / f"demo/scribbles/frame_{index:02}.png" for index in (0, 8, 15)}
    scribbles = {index: Image.open(path).convert("RGB") for index, path in paths.items()}
    made = pipeline.generate(PROMPT, [Keyframe(*item) for item in scribbles.items()], seed=SEED)
    pictures = {index: Image.fromarray(made.frames[index]) for index in scribbles}
    rows: dict[str, Any] = {}
    for controlnet, keyframes in (("scribble", scribbles), ("rgb", pictures)):
        clip = pipeline.generate(PROMPT, [Keyframe(*item) for item in keyframes.items()], controlnet, seed=SEED)
        for norm in ("frame", "clip"):
            for mode in (True, False) if controlnet == "rgb" else (True,):
                name = f"{controlnet}, temporal norm {norm}" + ("" if mode else ", drawn from the posterior")
                away = np.abs(clip.frames - diffusers_frames(controlnet, keyframes, norm, mode))
                rows[name] = {"max": int(away.max()), "mean": float(away.mean())}
                print(f"{name}: at most {away.max()}, {away.mean():.4f} in the mean")
    packages = ("sparsectrl-lcm", "torch", "diffusers", "onnxruntime", "numpy")
    report = report_head(reports.command(), packages) | {
        "request": {"prompt": PROMPT, "seed": SEED, "width": SIDE, "height": SIDE, "frames": 16, "steps": 4},
        "levels of 255": rows,
        "noise": noise(),
    }
    print(report["noise"])
    path = reports.results_file("fidelity")
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
