"""Samples the model before its distillation with many DDIM steps, to compare with few steps."""

from pathlib import Path

import numpy as np
import torch
from clips import Batch
from denoiser import Denoiser
from diffusers import AutoencoderKL
from drawing import clip, scribble
from evaluate import Frames, Make
from networks import LATENT_SIZE, make_schedule, to_pixels
from transformers import CLIPTokenizer
from world import FRAMES, KEYFRAMES, Scene

STEPS = 25


def with_ddim(folder: Path, steps: int = STEPS) -> Make:
    """Returns a maker of clips that uses the model of a training folder, before its distillation."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    denoiser = Denoiser(folder / "base").eval()
    denoiser.load_state_dict(torch.load(folder / "clips.pt", map_location="cpu", weights_only=True)["average"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "base" / "tokenizer")
    schedule = make_schedule()
    schedule.set_timesteps(steps)

    @torch.no_grad()
    def make(world: Scene, kind: str | None, seed: int) -> Frames:
        if kind == "rgb":
            keyframes = vae.encode(to_pixels(clip(world)[list(KEYFRAMES)], vae.device)).latent_dist.mean
        else:
            drawn = np.stack([scribble(world, index) for index in KEYFRAMES])
            keyframes = torch.from_numpy(drawn)[:, None].expand(-1, 3, -1, -1).float() / 255
        random = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, 4, FRAMES, LATENT_SIZE, LATENT_SIZE, generator=random)
        tokens = tokenizer([world.caption], padding="max_length", max_length=77, return_tensors="pt").input_ids
        request = Batch(latents, tokens, kind, keyframes[None], torch.tensor([KEYFRAMES]), torch.ones(1, 3, dtype=bool))
        for timestep in schedule.timesteps:
            predicted = denoiser(latents, timestep[None], request)
            latents = schedule.step(predicted, timestep, latents).prev_sample
        decoded = vae.decode(latents[0].transpose(0, 1)).sample
        return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).byte().numpy()

    return make
