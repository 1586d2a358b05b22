"""Last stages: train the four LCM steps to predict the clip from any latents that sampling reaches.

Distillation trains a student to follow its teacher. Here the loss compares each of the four steps with the clip itself,
with more weight on outlines. `words` trains only the first step, which decides the colour of each place, on two frames
of many clips with captions that are hard to tell apart: mixed with other clips, these are never learnt. `refine` then
trains all steps on all motions. Half of the later steps start from the output of the first step instead of the clip.
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
"""Kinds of keyframes of the training steps, in turn."""
HARD = ("changes", "crosses")
"""Motions with two colours. Three of four training steps of `words` use only these."""
FEW = 2
"""Frames of a partial clip. A batch has as many more clips; the meaning of words needs no more frames."""
OUTLINE = 4.0
"""Extra weight of the loss near outlines."""
ARRIVED = 0.5
"""Share of the later steps that start from the output of the first step."""


def schedule() -> list[int]:
    """Returns the timesteps of the runtime's LCM loop, the noisiest first."""
    known = [(index + 1) * (TRAIN_STEPS // LCM_STEPS) - 1 for index in range(LCM_STEPS)][::-1]
    return [known[step * LCM_STEPS // STEPS] for step in range(STEPS)]


def words(
    folder: Path, clips: Clips, device: torch.device, student: Denoiser, *, steps: int, batch: int, rate: float = 1e-3
) -> Denoiser:
    """Trains the first step of a distilled model on scribbles and captions; arguments as for `refine`."""
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
    """Trains all steps of a distilled model, in turn on whole clips and on a few frames of more clips.

    Without keyframes the target is the output of `before`: many clips fit a caption, and their mean is not a clip.

    Args:
        folder: for checkpoints.
        clips: the training data.
        device: trains there.
        student: the model to start from; not changed.
        before: the model before the last stages, the target without keyframes; not changed.
        steps: number of training steps.
        batch: number of whole clips in a batch.
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
    """Returns the error of predicted clips of a batch, with more weight near outlines."""
    weight = 1 + OUTLINE * near_outlines(clips.scribbles(part), made.shape[-1])
    return (_error(made, part.latents) * weight).sum() / (weight.sum() * made.shape[1])


def _error(made: Tensor, wanted: Tensor) -> Tensor:
    """Returns the pseudo-Huber error of each element."""
    return ((made - wanted).square() + 1e-4).sqrt()


def near_outlines(scribbles: Tensor, size: int) -> Tensor:
    """Marks the latents on an outline or beside one: 1.0 there, else 0.0.

    Args:
        scribbles: [B, F, H, W] in 0..1.
        size: of the latents, H / 8.

    Returns:
        [B, 1, F, size, size].
    """
    frames = scribbles.flatten(0, 1)[:, None]
    near = nn.functional.adaptive_max_pool2d(frames, size)
    return nn.functional.max_pool2d(near, 3, 1, 1).view(*scribbles.shape[:2], size, size)[:, None]
