"""Compares the demo bundle's frames and noise with those of diffusers and torch.

    python benchmarks/fidelity.py

Makes a request of the demo model with scribbles and with pictures as keyframes. Compares each with stock diffusers, and
with diffusers and the temporal norm of the original AnimateDiff code, which the bundle was exported for. Pictures are
also compared with a draw from the VAE's posterior instead of its mode. Measures what else the original code does
differently: residuals by the scope of the temporal norm, rounding to 8 bits, resizing and stretching of scribbles.
Takes two minutes and writes a JSON file into benchmarks/results/.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.pipelines.animatediff.pipeline_animatediff_sparsectrl as sparsectrl
import numpy as np
import reports
import torch
from diffusers import AnimateDiffSparseControlNetPipeline, LCMScheduler, MotionAdapter, SparseControlNetModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from PIL import Image
from sparsectrl_lcm.runtime import ClipRequest
from sparsectrl_lcm.runtime.loop.noise import TorchGenerator
from sparsectrl_lcm.runtime.machine import report_head

from sparsectrl_lcm import Keyframe, VideoPipeline

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "demo"))

from drawing import clip as drawn  # noqa: E402
from drawing import scribble  # noqa: E402
from measure import edge_f1  # noqa: E402
from world import HELD_OUT_SEED, KEYFRAMES, scene  # noqa: E402

TRAINED = ROOT / "demo" / "trained"
PROMPT, SEED, SIDE = "a yellow star grows over a navy and teal ground", 4, 128
NOISE_SEEDS, NOISE_SHAPE = range(20), (1, 4, 16, 64, 64)
SCENES, PALE = 8, 70
"""Held-out scenes for the comparison of scribbles, and the level of pale lines."""
draw_from_posterior = sparsectrl.retrieve_latents


class PerFrame(torch.nn.Module):
    """The temporal GroupNorm of the original AnimateDiff code: statistics of each frame. Takes [B, C, F, h, w]."""

    def __init__(self, norm: torch.nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.norm(frame) for frame in states.unbind(2)], dim=2)


def diffusers_pipeline(controlnet: str, norm: str, mode: bool) -> AnimateDiffSparseControlNetPipeline:
    """diffusers with the demo model.

    Args:
        controlnet: scribble or rgb.
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
    return pipe


def diffusers_frames(
    pipe: AnimateDiffSparseControlNetPipeline, keyframes: dict[int, Image.Image]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """diffusers' frames of the request, [F, H, W, 3] of 0 to 1, and SparseCtrl's residuals of its first step."""
    residuals: list[np.ndarray] = []

    def keep(_: torch.nn.Module, __: Any, output: tuple[list[torch.Tensor], torch.Tensor]) -> None:
        if not residuals:
            residuals.extend(states.numpy() for states in (*output[0], output[1]))

    hook = pipe.controlnet.register_forward_hook(keep)
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
    hook.remove()
    return frames, residuals


def levels(frames: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """The largest and the mean difference of frames in levels of 255."""
    away = np.abs(frames.astype(int) - others.astype(int))
    return {"max": int(away.max()), "mean": float(away.mean())}


def relative(residuals: list[np.ndarray], others: list[np.ndarray], frames: list[int]) -> float:
    """The norm of the differences of residuals [F, C, h, w] at some frames, relative to the norm of `others`."""
    apart = sum(
        float(np.square(ours[frames] - theirs[frames]).sum()) for ours, theirs in zip(residuals, others, strict=True)
    )
    return float((apart / sum(float(np.square(theirs[frames]).sum()) for theirs in others)) ** 0.5)


def scribbles(pipeline: VideoPipeline) -> dict[str, Any]:
    """What resizing and stretching do to clips from scribbles that are four times as large as the clip, or pale.

    Returns:
        `resample`: differences of keyframes and of frames between lanczos and bilinear. `edges`: F1 of the edges at the
        keyframes with white lines, with pale lines, and with pale lines stretched.
    """
    keyframes, frames, edges = [], [], []
    for number in range(SCENES):
        world = scene(HELD_OUT_SEED + number)
        large = [Keyframe(index, scribble(world, index, 4)) for index in KEYFRAMES]
        asked = ClipRequest(world.caption, large, seed=number)
        lanczos, bilinear = pipeline.run(asked), pipeline.run(replace(asked, resample="bilinear"))
        frames.append(levels(lanczos.frames, bilinear.frames))
        pairs = zip(lanczos.keyframes, bilinear.keyframes, strict=True)
        keyframes += [levels(ours.pixels, theirs.pixels) for ours, theirs in pairs]
        truth = drawn(world)
        white = [scribble(world, index) for index in KEYFRAMES]
        pale = [(picture * (PALE / 255)).astype(np.uint8) for picture in white]
        edges.append([])
        for pictures, stretched in ((white, False), (pale, False), (pale, True)):
            given = [Keyframe(index, picture) for index, picture in zip(KEYFRAMES, pictures, strict=True)]
            made = pipeline.run(replace(asked, keyframes=given, normalize_scribbles=stretched)).frames
            edges[-1].append(float(np.mean([edge_f1(made[index], truth[index]) for index in KEYFRAMES])))
    return {
        "resample": {"keyframes": _widest(keyframes), "frames": _widest(frames)},
        "edges": dict(zip(("white", f"pale ({PALE})", "pale, stretched"), np.mean(edges, 0).tolist(), strict=True)),
    }


def _widest(rows: list[dict[str, float]]) -> dict[str, float]:
    return {"max": max(row["max"] for row in rows), "mean": float(np.mean([row["mean"] for row in rows]))}


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
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipeline = VideoPipeline.load(backend="onnxruntime")
    paths = {index: ROOT / f"demo/scribbles/frame_{index:02}.png" for index in (0, 8, 15)}
    drawings = {index: Image.open(path).convert("RGB") for index, path in paths.items()}
    made = pipeline.generate(PROMPT, [Keyframe(*item) for item in drawings.items()], seed=SEED)
    pictures = {index: Image.fromarray(made.frames[index]) for index in drawings}
    rows: dict[str, Any] = {}
    norms: dict[str, Any] = {}
    for controlnet, keyframes in (("scribble", drawings), ("rgb", pictures)):
        clip = pipeline.generate(PROMPT, [Keyframe(*item) for item in keyframes.items()], controlnet, seed=SEED)
        residuals = {}
        for norm in ("frame", "clip"):
            for mode in (False, True) if controlnet == "rgb" else (True,):
                name = f"{controlnet}, temporal norm {norm}" + ("" if mode else ", drawn from the posterior")
                theirs, residuals[norm] = diffusers_frames(diffusers_pipeline(controlnet, norm, mode), keyframes)
                rows[name] = levels(clip.frames, (theirs * 255).round())
                rows[f"{name}, truncated"] = levels(clip.frames, (theirs * 255).astype(np.uint8))
                print(name, rows[name])
        others = [index for index in range(16) if index not in keyframes]
        norms[controlnet] = {
            place: relative(residuals["clip"], residuals["frame"], frames)
            for place, frames in (("keyframes", list(keyframes)), ("other frames", others))
        }
    packages = ("sparsectrl-lcm", "torch", "diffusers", "onnxruntime", "numpy", "pillow")
    report = report_head(reports.command(), packages) | {
        "request": {"prompt": PROMPT, "seed": SEED, "width": SIDE, "height": SIDE, "frames": 16, "steps": 4},
        "levels of 255": rows,
        "residuals by temporal norm": norms,
        "scribbles": scribbles(pipeline),
        "noise": noise(),
    }
    print({name: report[name] for name in ("residuals by temporal norm", "scribbles", "noise")})
    path = reports.results_file("fidelity")
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
