"""Trains the autoencoder on single frames, the first stage, and its tiny decoder on the latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from drawing import frame
from networks import make_tiny, make_vae, to_pixels
from torch import Tensor
from torch.nn import functional
from training import Stage, averaged, fit, generator
from world import FRAMES, HELD_OUT_SEED, SIZE, scene

BATCH, CROP = 16, 64
"""Squares per batch, and their side in pixels. They lie around shapes, since grounds are learnt quickly."""
WHOLE = 0.15
"""Share of the steps, the last ones, that train on whole frames."""
KL_WEIGHT = 2e-5


def frames(first: int, count: int, device: torch.device, crop: int = SIZE) -> Tensor:
    """Draws frames of training scenes, or squares cut from them, [N, 3, crop, crop] in -1..1."""
    rng = np.random.default_rng(first)
    drawn = []
    for _ in range(count):
        world, index = scene(int(rng.integers(HELD_OUT_SEED))), int(rng.integers(FRAMES))
        centre = np.array(world.shapes[-1].at(index).centre) + rng.uniform(-24, 24, 2)
        left, top = np.clip(np.round(centre / 8) * 8 - crop // 2, 0, SIZE - crop).astype(int)
        drawn.append(frame(world, index)[top : top + crop, left : left + crop])
    return to_pixels(np.stack(drawn), device)


def difference(made: Tensor, wanted: Tensor) -> Tensor:
    """Returns L1 plus twice L2: the weight of L2 makes edges count."""
    return functional.l1_loss(made, wanted) + 2 * functional.mse_loss(made, wanted)


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Returns the PSNR in dB of pictures in -1..1."""
    error = functional.mse_loss(made.detach().clamp(-1, 1), wanted)
    return float(10 * torch.log10(4 / error))


def _batch(step: int, steps: int, device: torch.device) -> Tensor:
    if step < (1 - WHOLE) * steps:
        return frames(step, BATCH, device, CROP)
    return frames(step, BATCH * CROP**2 // SIZE**2, device)


def train_vae(folder: Path, device: torch.device, steps: int) -> AutoencoderKL:
    """Trains the autoencoder; its latents have unit variance."""
    torch.manual_seed(1)
    vae = make_vae().to(device)
    average = averaged(vae)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        images = _batch(step, steps, device)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(2, step)).to(device)
        made = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return difference(made, images) + KL_WEIGHT * kl, {"psnr": psnr(made, images), "kl": float(kl.detach())}

    fit(Stage("vae", steps, 2e-3, average=0.995), folder, vae, average, loss)
    whiten(average, torch.cat([frames(10**9 + place, BATCH, device) for place in range(6)]))
    average.save_pretrained(folder / "vae")
    return average


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Gives the latents mean 0 and variance 1 in each channel, by changing the convolutions before and after them."""
    latents = vae.encode(images).latent_dist.mean.transpose(0, 1).flatten(1)
    count, mean, deviation = len(latents), latents.mean(1), latents.std(1)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:count] /= deviation[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean) / deviation
    before.bias[count:] -= 2 * deviation.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[:, None, None]


def train_tiny(folder: Path, device: torch.device, steps: int, vae: AutoencoderKL) -> AutoencoderTiny:
    """Trains the tiny decoder on the autoencoder's latents, with a little noise, like the latents of the loop."""
    torch.manual_seed(3)
    tiny = make_tiny().to(device)
    tiny.encoder.requires_grad_(False)
    average = averaged(tiny)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        images = _batch(step, steps, device)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator(4, step)).to(device)
        made = tiny.decoder(latents + 0.05 * noise)
        return difference(made, images), {"psnr": psnr(made, images)}

    fit(Stage("tiny", steps, 2e-3, average=0.995), folder, tiny, average, loss)
    average.save_pretrained(folder / "tiny_decoder")
    return average
