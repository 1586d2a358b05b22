"""The schedule against diffusers' LCMScheduler."""

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from sparsectrl_lcm.runtime.manifest import SchedulerRecord
from sparsectrl_lcm.runtime.schedule import lcm_schedule


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", range(1, 13))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_steps_are_those_of_diffusers(betas: str, steps: int, prediction_type: str) -> None:
    reference = LCMScheduler(beta_schedule=betas, prediction_type=prediction_type)
    reference.set_timesteps(steps)
    schedule = lcm_schedule(SchedulerRecord(beta_start=0.00085, beta_end=0.012, beta_schedule=betas), steps)
    assert schedule.timesteps.tolist() == reference.timesteps.tolist()

    latents = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    mine = latents.numpy()
    noise_generator = torch.Generator().manual_seed(1)
    for step, timestep in enumerate(reference.timesteps):
        prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(10 + step))
        noise = torch.randn(latents.shape, generator=torch.Generator().set_state(noise_generator.get_state()))
        latents = reference.step(prediction, timestep, latents, generator=noise_generator).prev_sample
        mine = _update(mine, prediction.numpy(), noise.numpy(), schedule.coefficients[step], prediction_type)
        assert np.abs(mine - latents.numpy()).max() <= 1e-5 * max(1, np.abs(mine).max())


def _update(
    latents: np.ndarray, prediction: np.ndarray, noise: np.ndarray, coefficients: np.ndarray, prediction_type: str
) -> np.ndarray:
    alpha, sigma, c_skip, c_out, next_alpha, next_sigma = coefficients
    original = {
        "epsilon": (latents - sigma * prediction) / alpha,
        "v_prediction": alpha * latents - sigma * prediction,
        "sample": prediction,
    }[prediction_type]
    return next_alpha * (c_out * original + c_skip * latents) + next_sigma * noise


def test_more_steps_than_distilled_are_refused() -> None:
    record = SchedulerRecord(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", original_inference_steps=8)
    with pytest.raises(ValueError, match="1 to 8"):
        lcm_schedule(record, 9)
