"""Stages `images`, `clips` and `lcm`: train on single frames, then on clips with motion, then distill to few steps."""

from pathlib import Path

import torch
from clips import Batch, Clips
from denoiser import Denoiser
from torch import Tensor, nn
from training import Stage, averaged, fit, generator
from world import FRAMES

TRAIN_STEPS = 1000
KINDS = ("scribble", "rgb", "scribble", "rgb", "scribble", None)
"""Kinds of keyframes of the training steps, in turn."""
IMAGES = 6
"""Single frames in a batch for each clip in a batch of clips."""
LCM_STEPS = 50
"""Steps of the schedule that the distilled steps are taken from, as in the runtime."""
SKIP = 4
"""Steps of that schedule that the teacher takes at once."""


def train_denoiser(
    folder: Path, clips: Clips, device: torch.device, *, images: int, steps: int, batch: int
) -> Denoiser:
    """Trains on single frames without the motion modules, then everything on clips; the model predicts v.

    Args:
        folder: for checkpoints.
        clips: the training data.
        device: trains there.
        images: steps on single frames, with `IMAGES` times `batch` in each batch.
        steps: steps on clips.
        batch: clips in a batch.
    """
    torch.manual_seed(5)
    denoiser = Denoiser(folder / "base").to(device)
    average = averaged(denoiser)

    def loss(step: int, size: int, frames: int) -> tuple[Tensor, dict[str, float]]:
        part = clips.batch(step, size, KINDS[step % len(KINDS)], frames)
        random = generator(6, step, frames)
        timestep = _timesteps(size, random).to(device)
        noise = torch.randn(part.latents.shape, generator=random).to(device)
        alpha, sigma = denoiser.levels(timestep)
        wanted = alpha * noise - sigma * part.latents
        value = (denoiser(alpha * part.latents + sigma * noise, timestep, part) - wanted).square().mean()
        return value, by_kind(part, value)

    for parameter in denoiser.motion_parameters():
        parameter.requires_grad_(False)
    fit(
        Stage("images", images, 2e-3, average=0.99),
        folder,
        denoiser,
        average,
        lambda step: loss(step, batch * IMAGES, 1),
    )
    denoiser.requires_grad_(True)
    fit(Stage("clips", steps, 1.5e-3), folder, denoiser, average, lambda step: loss(step, batch, FRAMES))
    denoiser.load_state_dict(average.state_dict())
    return denoiser


def copies(folder: Path, model: Denoiser, device: torch.device) -> tuple[Denoiser, nn.Module]:
    """Returns a copy of a model to train, and its averaged weights."""
    student = Denoiser(folder / "base").to(device)
    student.load_state_dict(model.state_dict())
    return student, averaged(student)


def by_kind(part: Batch, value: Tensor) -> dict[str, float]:
    """Returns the loss under the kind of the batch's keyframes."""
    return {part.kind or "text": float(value.detach())}


def _timesteps(size: int, random: torch.Generator) -> Tensor:
    """Draws timesteps: half uniform, half towards the noisy end, where the first of few steps is."""
    even = torch.rand(size, generator=random)
    noisy = torch.rand(size, generator=random) < 0.5
    return ((1 - torch.where(noisy, even**2, even)) * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)


def distill(folder: Path, clips: Clips, device: torch.device, teacher: Denoiser, *, steps: int, batch: int) -> Denoiser:
    """Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378, algorithm 1), without guidance.

    The teacher takes a DDIM step to a less noisy timestep. The target for the student is the clip that its averaged
    weights predict there.
    """
    teacher = averaged(teacher)  # type: ignore[assignment]
    student, target = copies(folder, teacher, device)
    schedule = torch.arange(1, LCM_STEPS + 1, device=device) * (TRAIN_STEPS // LCM_STEPS) - 1

    def consistent(model: Denoiser, latents: Tensor, timestep: Tensor, part: Batch) -> Tensor:
        scaled = timestep[:, None, None, None, None] * 10.0  # LCMScheduler's boundary condition
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * latents + out * model.original(latents, timestep, part)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        part = clips.batch(10**6 + step, batch, KINDS[step % len(KINDS)])
        random = generator(7, step)
        noise = torch.randn(part.latents.shape, generator=random).to(device)
        place = torch.randint(LCM_STEPS, (batch,), generator=random).to(device)
        start, end = schedule[place], schedule[(place - SKIP).clamp(min=0)]
        alpha, sigma = teacher.levels(start)
        latents = alpha * part.latents + sigma * noise
        with torch.no_grad():
            original = teacher.original(latents, start, part)
            next_alpha, next_sigma = teacher.levels(end)
            led = next_alpha * original + next_sigma * (latents - alpha * original) / sigma  # DDIM, eta 0
            wanted = consistent(target, led, end, part)  # type: ignore[arg-type]
            first = (place < SKIP)[:, None, None, None, None]
            wanted = torch.where(first, part.latents, wanted)  # boundary condition: the clip itself
        error = consistent(student, latents, start, part) - wanted
        value = (error.square() + 1e-6).sqrt().mean()  # pseudo-Huber
        return value, by_kind(part, value)

    fit(Stage("lcm", steps, 3e-4, warmup=50, average=0.99), folder, student, target, loss)
    return target  # type: ignore[return-value]
