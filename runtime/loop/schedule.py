"""The schedule of Latent Consistency Models: timesteps and coefficients, as pure functions.

Source: Luo et al. 2023 (arXiv:2310.04378). The values are those of diffusers' `LCMScheduler`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..format.manifest import SchedulerRecord

SIGMA_DATA = 0.5


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of one request.

    Attributes:
        timesteps: float32 [S], from noise to clip.
        coefficients: float32 [S, 6], an input of the `lcm_update` graph: sqrt(alpha), sqrt(1 - alpha), c_skip, c_out,
            and sqrt(alpha), sqrt(1 - alpha) of the next timestep (1 and 0 after the last).
    """

    timesteps: NDArray[np.float32]
    coefficients: NDArray[np.float32]


def lcm_schedule(record: SchedulerRecord, steps: int) -> Schedule:
    """The schedule of `steps` steps.

    Raises:
        ValueError: `steps` is below 1, or above the steps of the schedule that the model was distilled with.
    """
    if not 1 <= steps <= record.original_inference_steps:
        raise ValueError(f"steps {steps} is out of range; allowed are 1 to {record.original_inference_steps}")
    timesteps = lcm_timesteps(record, steps)
    alphas = alphas_cumprod(record)[timesteps]  # [S]
    c_skip, c_out = boundary_scalings(timesteps, record.timestep_scaling)
    next_alphas = np.append(alphas[1:], np.float32(1))
    one = np.float32(1)
    columns = [np.sqrt(alphas), np.sqrt(one - alphas), c_skip, c_out, np.sqrt(next_alphas), np.sqrt(one - next_alphas)]
    return Schedule(timesteps.astype(np.float32), np.stack(columns, axis=1).astype(np.float32))


def controlled_steps(steps: int, start: float, end: float) -> range:
    """The steps, counted from 0, that lie between two fractions of the schedule; they follow one another.

    Source: `control_guidance_start` and `control_guidance_end` of diffusers' ControlNet pipelines.
    """
    inside = [step for step in range(steps) if not (step / steps < start or (step + 1) / steps > end)]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def alphas_cumprod(record: SchedulerRecord) -> NDArray[np.float32]:
    """The cumulative products of 1 - beta, float32 [T]."""
    start, end, count = record.beta_start, record.beta_end, record.num_train_timesteps
    if record.beta_schedule == "linear":
        betas = linspace(start, end, count)
    else:
        betas = linspace(start**0.5, end**0.5, count) ** 2
    return np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)


def linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """`count` evenly spaced values, computed from both ends to the middle to round like `torch.linspace`."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def lcm_timesteps(record: SchedulerRecord, steps: int) -> NDArray[np.int64]:
    """`steps` timesteps of the distilled schedule, at evenly spaced indices, the noisiest first; int64 [S]."""
    skip = record.num_train_timesteps // record.original_inference_steps
    original = np.arange(1, record.original_inference_steps + 1)[::-1] * skip - 1
    return original[np.floor(np.linspace(0, len(original), steps, endpoint=False)).astype(np.int64)]


def boundary_scalings(timesteps: NDArray[np.int64], scaling: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """c_skip and c_out of the consistency function (Song et al. 2023, arXiv:2303.01469, eq. 5)."""
    scaled = timesteps.astype(np.float64) * scaling
    total = scaled**2 + SIGMA_DATA**2
    return np.divide(SIGMA_DATA**2, total, dtype=np.float64), np.divide(scaled, np.sqrt(total), dtype=np.float64)
