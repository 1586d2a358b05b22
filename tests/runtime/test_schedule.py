"""The schedule against diffusers' LCMScheduler."""

import pytest
import torch
from diffusers import LCMScheduler
from sparsectrl_lcm.export.traced_modules import LcmUpdate
from sparsectrl_lcm.runtime.format.manifest import SchedulerRecord
from sparsectrl_lcm.runtime.loop.schedule import lcm_schedule


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", range(1, 13))
@pytest.mark.parametrize(
    ("prediction_type", "clip_range"), [("epsilon", None), ("v_prediction", None), ("sample", None), ("epsilon", 0.7)]
)
def test_steps_are_those_of_diffusers(betas: str, steps: int, prediction_type: str, clip_range: float | None) -> None:
    reference = LCMScheduler(
        beta_schedule=betas,
        prediction_type=prediction_type,
        clip_sample=clip_range is not None,
        clip_sample_range=clip_range or 1.0,
    )
    record = SchedulerRecord(beta_start=0.00085, beta_end=0.012, beta_schedule=betas)
    compare_steps(reference, record, steps, LcmUpdate(prediction_type, clip_range))


@pytest.mark.parametrize("scaling", [0.002, 10.0])
def test_another_timestep_scaling(scaling: float) -> None:
    """With a small one, the result of a step keeps much of its latents."""
    reference = LCMScheduler(beta_schedule="linear", timestep_scaling=scaling)
    record = SchedulerRecord(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", timestep_scaling=scaling)
    compare_steps(reference, record, 4, LcmUpdate("epsilon", None))
    assert (lcm_schedule(record, 4).coefficients[:, 2] > 0.05).any() == (scaling < 1), "c_skip"


def compare_steps(reference: LCMScheduler, record: SchedulerRecord, steps: int, graph: LcmUpdate) -> None:
    """Runs the `lcm_update` graph with the runtime's coefficients, step by step against LCMScheduler."""
    reference.set_timesteps(steps)
    schedule = lcm_schedule(record, steps)
    assert schedule.timesteps.tolist() == reference.timesteps.tolist()

    unused = torch.ones(1)
    latents = mine = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    noise_generator = torch.Generator().manual_seed(1)
    for step, timestep in enumerate(reference.timesteps):
        prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(10 + step))
        noise = torch.randn(latents.shape, generator=torch.Generator().set_state(noise_generator.get_state()))
        expected = reference.step(prediction, timestep, latents, generator=noise_generator)
        latents = expected.prev_sample
        coefficients = torch.from_numpy(schedule.coefficients[step])
        mine, images = graph(mine, prediction, prediction, unused, noise, coefficients)
        for actual, wanted in ((mine, latents), (images, expected.denoised[0].transpose(0, 1))):
            assert (actual - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 8])
def test_a_hundred_original_steps(steps: int) -> None:
    """AnimateLCM's schedule: at 4 steps 999, 749, 499 and 249 instead of 999, 759, 499 and 259."""
    reference = LCMScheduler(beta_schedule="linear", original_inference_steps=100)
    reference.set_timesteps(steps)
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "original_inference_steps": 100}
    schedule = lcm_schedule(SchedulerRecord.model_validate(settings), steps)
    assert schedule.timesteps.tolist() == reference.timesteps.tolist()
    if steps == 4:
        assert schedule.timesteps.tolist() == [999, 749, 499, 249]


def test_more_steps_than_distilled_are_refused() -> None:
    record = SchedulerRecord(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", original_inference_steps=8)
    with pytest.raises(ValueError, match="1 to 8"):
        lcm_schedule(record, 9)
