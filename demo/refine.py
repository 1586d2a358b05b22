"""Last stages: the few steps themselves, taught to give the clip from wherever sampling arrives.

Distillation leaves a student that follows its teacher; here each of the four steps is drawn to the clip directly, its
outlines first. `words` trains the first step alone, which decides what colour is where, on two frames of many clips
whose words are hard to tell apart: among all else they are never learnt. `refine` then trains all steps on all motions,
half of the time from what the first step gave instead of from the clip itself.
"""

from pathlib import Path

import torch
from clips import Batch, Clips
from denoiser import Denoiser
from torch import Tensor, nn
from train_denoiser import LCM_STEPS, TRAIN_STEPS, by_kind, copies
from training import Stage, averaged, fit, generator
from world import FRAMES

STEPS = 4
KINDS = ("scribble", "scribble", "rgb", "scribble", "scribble", "scribble", "scribble", None)
"""Which keyframes the training's steps get, in turn."""
HARD = ("changes", "crosses")
"""Motions of two colours, which are all that three of four steps of `words` see."""
FEW = 2
"""Frames of a clip where it is not seen whole, of as many more clips: what words mean needs no others."""
OUTLINE = 4.0
"""How much more the surroundings of outlines count."""
ARRIVED = 0.5
"""Share of the later steps that begin where the first one arrives."""


def schedule() -> list[int]:
    """The timesteps of the runtime's LCM loop, the noisiest first."""
    known = [(index + 1) * (TRAIN_STEPS // LCM_STEPS) - 1 for index in range(LCM_STEPS)][::-1]
    return [known[step * LCM_STEPS // STEPS] for step in range(STEPS)]


def words(
    folder: Path, clips: Clips, device: torch.device, student: Denoiser, *, steps: int, batch: int, rate: float = 1e-3
) -> Denoiser:
    """Trains the first step of a distilled model on scribbles and captions; arguments as of `refine`."""
    denoiser, average = copies(folder, student, device)
    first = schedule()[0]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        size = batch * FRAMES // FEW
        part = clips.batch(3 * 10**6 + step, size, "scribble", FEW, HARD if step % 4 else None)
        noise = torch.randn(part.latents.shape, generator=generator(9, step)).to(device)
        value = _distance(clips, part, denoiser.original(noise, torch.full((size,), first, device=device), part))
        return value, {}

    fit(Stage("words", steps, rate, warmup=20, average=0.99), folder, denoiser, average, loss)
    return average  # type: ignore[return-value]


def refine(
    folder: Path,
    clips: Clips,
    device: torch.device,
    student: Denoiser,
    before: Denoiser,
    *,
    steps: int,
    batch: int,
    rate: float = 8e-4,
) -> Denoiser:
    """Trains all steps of a distilled model on clips, whole ones and a few frames of more of them in turn.

    Clips without keyframes are drawn to what an earlier model gives: the mean of all clips of a caption is none.

    Args:
        folder: for checkpoints.
        clips: what is learnt.
        device: where.
        student: stays as it is.
        before: what the training began with; stays as it is.
        steps: of the training.
        batch: whole clips in a batch.
        rate: the highest learning rate.
    """
    before = averaged(before).to(device)  # type: ignore[assignment]
    denoiser, average = copies(folder, student, device)
    timesteps = schedule()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        kind = KINDS[step % len(KINDS)]
        frames = FRAMES if step // len(KINDS) % 2 else FEW
        size = batch * FRAMES // frames
        part = clips.batch(2 * 10**6 + step, size, kind, frames)
        random = generator(8, step)
        # the first step twice as often as each of the others
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
        if kind is None:
            with torch.no_grad():
                wanted = before.original(latents, timestep, part)
            value = _error(made, wanted).mean()
        else:
            value = _distance(clips, part, made)
        return value, by_kind(part, value)

    fit(Stage("refine", steps, rate, warmup=50, average=0.995), folder, denoiser, average, loss)
    return average  # type: ignore[return-value]


def _distance(clips: Clips, part: Batch, made: Tensor) -> Tensor:
    """Of what was made from the clips of a batch, outlines first."""
    weight = 1 + OUTLINE * near_outlines(clips.scribbles(part), made.shape[-1])
    return (_error(made, part.latents) * weight).sum() / (weight.sum() * made.shape[1])


def _error(made: Tensor, wanted: Tensor) -> Tensor:
    """Pseudo-Huber, of each number."""
    return ((made - wanted).square() + 1e-4).sqrt()


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
