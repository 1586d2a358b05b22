"""The training loop of all stages: warm-up and cosine decay, averaged weights, checkpoints, a curve.

Muon optimizes the matrices of linear layers, AdamW all other weights.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

SAVE_SECONDS = 60.0
LOG_STEPS = 48
"""Steps per row of a curve: a multiple of the number of `KINDS` in every stage."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Settings of one stage.

    Attributes:
        name: of its checkpoint and curve.
        steps: number of steps.
        rate: the highest learning rate.
        warmup: steps until the rate is reached.
        average: decay of the averaged weights per step.
        clip: the largest norm of the gradient.
    """

    name: str
    steps: int
    rate: float
    warmup: int = 100
    average: float = 0.998
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then half a cosine down to a fiftieth."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def averaged(module: nn.Module) -> nn.Module:
    """Copies a module, to hold its averaged weights; the copy is not trained."""
    return deepcopy(module).requires_grad_(False).eval()


def make_optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Returns AdamW, and Muon for the matrices of linear layers, scaled to AdamW's step size."""
    linear = {layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter in linear]
    rest = [parameter for parameter in trained if parameter not in linear]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, keep: float) -> None:
    """Moves averaged weights towards a module's; `keep` is the decay."""
    mine, theirs = list(average.parameters()), [p.detach() for p in module.parameters()]
    torch._foreach_lerp_(mine, theirs, 1 - keep)


def fit(
    stage: Stage,
    folder: Path,
    module: nn.Module,
    average: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
) -> None:
    """Trains a module from its last checkpoint to the end of the stage.

    Args:
        stage: its settings.
        folder: gets NAME.pt, the checkpoint, and NAME.jsonl, the curve.
        module: the module to train; frozen parameters do not change.
        average: its averaged weights, see `averaged`.
        loss: returns the loss and figures of a step. Its random numbers must depend only on the step, so that an
            interrupted run gives the same result.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(module, stage.rate)
    path, first = folder / f"{stage.name}.pt", 0
    if path.exists():
        saved = torch.load(path, map_location=trained[0].device, weights_only=True)
        module.load_state_dict(saved["module"])
        average.load_state_dict(saved["average"])
        first = saved["step"]
        if first < stage.steps:
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)

    def save(step: int) -> None:
        state = {"step": step, "module": module.state_dict(), "average": average.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = saved_at = time.monotonic()
    seen: dict[str, list[float]] = {}
    _cut_curve(folder, stage.name, first)
    with Progress(*columns) as bar, (folder / f"{stage.name}.jsonl").open("a", encoding="utf-8") as curve:
        task = bar.add_task(stage.name, total=stage.steps, completed=first)
        for step in range(first, stage.steps):
            value, figures = loss(step)
            module.zero_grad(set_to_none=True)
            value.backward()
            figures["gradient"] = float(nn.utils.clip_grad_norm_(trained, stage.clip))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = stage.rate_at(step)
                optimizer.step()
            follow(average, module, min(stage.average, (1 + step) / (10 + step)))
            for name, figure in (figures | {"loss": float(value.detach())}).items():
                seen.setdefault(name, []).append(figure)
            if (step + 1) % LOG_STEPS == 0:
                row = {"step": step + 1, "seconds": round(time.monotonic() - began, 1)}
                means = {name: sum(figures) / len(figures) for name, figures in seen.items()}
                curve.write(json.dumps(row | {name: float(f"{mean:.4g}") for name, mean in means.items()}) + "\n")
                curve.flush()
                bar.update(task, completed=step + 1, description=f"{stage.name} {means['loss']:.4f}")
                seen = {}
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save(step + 1)
                saved_at = time.monotonic()
    if first < stage.steps:
        save(stage.steps)


def _cut_curve(folder: Path, name: str, step: int) -> None:
    """Drops the rows after a step: they are written again."""
    rows = [row for row in read_curve(folder, name) if row["step"] <= step]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def generator(*seeds: int) -> torch.Generator:
    """Returns a random generator that depends only on these seeds."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed) % 2**63
    return torch.Generator().manual_seed(mixed)


def read_curve(folder: Path, name: str) -> Iterable[dict[str, float]]:
    """Yields the rows of a stage's curve."""
    with suppress(FileNotFoundError):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
