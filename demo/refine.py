"""Last stage: the few steps themselves, taught to give the clip from wherever sampling arrives.

Distillation leaves a student that follows its teacher; here each of the four steps is drawn to the clip directly, its
outlines first, half of the time from what the first step gave instead of from the clip itself.
"""

from pathlib import Path

import torch
from clips import Clips
from denoiser import Denoiser
from torch import Tensor, nn
from train_denoiser import LCM_STEPS, TRAIN_STEPS, by_kind
from training import Stage, averaged, fit, generator
from world import FRAMES

STEPS = 4
KINDS = ("scribble", "scribble", "rgb", "scribble", "scribble", "scribble", "scribble", None)
"""Which keyframes the training's steps get, in turn."""
FEW = 2
"""Frames of a clip that most of the training sees, of as many more clips: what words mean needs no others."""
WHOLE = 0.3
"""Share of the steps, the last, that see whole clips."""
OUTLINE = 4.0
"""How much more the surroundings of outlines count."""
ARRIVED = 0.5
"""Share of the later steps that begin where the first one arrives."""


def schedule() -> list[int]:
    """The timesteps of the runtime's LCM loop, the noisiest first."""
    known = [(index + 1) * (TRAIN_STEPS // LCM_STEPS) - 1 for index in range(LCM_STEPS)][::-1]
    return [known[step * LCM_STEPS // STEPS] for step in range(STEPS)]


def refine(
    folder: Path, clips: Clips, device: torch.device, student: Denoiser, *, steps: int, batch: int, rate: float = 8e-4
) -> Denoiser:
    """Trains the steps of a distilled model on clips.

    Clips without keyframes are drawn to what the student gave before: the mean of all clips of a caption is none.

    Args:
        folder: for checkpoints.
        clips: what is learnt.
        device: where.
        student: stays as it is.
        steps: of the training.
        batch: whole clips in a batch.
        rate: the highest learning rate.
    """
    before = averaged(student).to(device)
    denoiser = Denoiser(folder / "base").to(device)
    denoiser.load_state_dict(before.state_dict())
    average = averaged(denoiser)
    timesteps = schedule()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        kind = KINDS[step % len(KINDS)]
        frames = FRAMES if step >= (1 - WHOLE) * steps else FEW
        size = batch * FRAMES // frames
        part = clips.batch(2 * 10**6 + step, size, kind, frames)
        random = generator(8, step)
        place, arrived = int(torch.randint(STEPS + 1, (), generator=random)) % STEPS, torch.rand((), generator=random)
        first, noise = (torch.randn(part.latents.shape, generator=random).to(device) for _ in range(2))
        start = torch.full((size,), timesteps[0], device=device)
        timestep = torch.full_like(start, timesteps[place])
        latents = noise
        if place:
            clean = part.latents
            if arrived < ARRIVED:
                with torch.no_grad():
                    clean = denoiser.original(first, start, part)
            alpha, sigma = denoiser.levels(timestep)
            latents = alpha * clean + sigma * noise
        made = denoiser.original(latents, timestep, part)
        outlines = near_outlines(clips.scribbles(part), latents.shape[-1])
        wanted, weight = part.latents, 1 + OUTLINE * outlines
        if kind is None:
            with torch.no_grad():
                wanted, weight = before.original(latents, timestep, part), torch.ones_like(weight)
        error = ((made - wanted).square() + 1e-4).sqrt()  # pseudo-Huber
        value = (error * weight).sum() / (weight.sum() * error.shape[1])
        return value, by_kind(part, value, KINDS)

    fit(Stage("refine", steps, rate, warmup=50, average=0.995), folder, denoiser, average, loss)
    return average  # type: ignore[return-value]


def near_outlines(scribbles: Tensor, size: int) -> Tensor:
    """Where latents show outlines, or lie beside one: 1.0 there, else 0.0.

    Args:
        scribbles: [B, F, H, W] in 0..1.
        size: of the latents, H / 8.

    Returns:
        [B, 1, F, size, size].
    """
    frames = scribbles.flatten(0, 1)[:, None]
    near = nn.functional.adaptive_max_pool2d(frames, size)
    return nn.functional.max_pool2d(near, 3, 1, 1).view(*scribbles.shape[:2], size, size)[:, None]
