"""Sizes and schedules from configurations and options, before any graph is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, LCMScheduler
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.plan import ExportOptions, Parts, read_parts


def parts_of(checkpoints: Path, base: Path | None = None, **options: Any) -> Parts:
    return read_parts(ExportOptions(str(base or checkpoints / "base"), str(checkpoints / "motion_adapter"), **options))


def with_unet(checkpoints: Path, folder: Path, **changes: Any) -> Path:
    """Copies the base with changed settings of its UNet."""
    shutil.copytree(checkpoints / "base", folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("sample_size", "sides"), [(16, (128, 128)), ([8, 16], (64, 128)), ([24, 8], (192, 64)), (None, (512, 512))]
)
def test_sample_size(
    sample_size: int | list[int] | None, sides: tuple[int, int], checkpoints: Path, tmp_path: Path
) -> None:
    sizes = parts_of(checkpoints, with_unet(checkpoints, tmp_path / "base", sample_size=sample_size)).sizes
    assert (sizes.height, sizes.width) == sides


def test_the_size_that_was_asked_for_goes_first(checkpoints: Path, tmp_path: Path) -> None:
    base = with_unet(checkpoints, tmp_path / "base", sample_size=[8, 16])
    sizes = parts_of(checkpoints, base, height=256).sizes
    assert (sizes.height, sizes.width) == (256, 128)


def test_a_unet_that_is_distilled_for_lcm_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    base = with_unet(checkpoints, tmp_path / "base", time_cond_proj_dim=256)
    with pytest.raises(ExportError, match="base: .* undistilled base, and pass the LCM-LoRA as a LoRA") as error:
        parts_of(checkpoints, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is not supported: .*'linear' or 'scaled_linear'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2' is not supported"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps='x' is not supported: .* integer"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 is not supported: .* greater than or equal to 1"),
        ({"num_train_timesteps": 20}, "num_train_timesteps=20, .*: original_inference_steps must be at most"),
        ({"timestep_scaling": "x"}, "timestep_scaling='x' is not supported: .* number"),
        ({"beta_end": 2}, "beta_end=2 is not supported: .* less than 1"),
        ({"clip_sample": "no"}, "clip_sample='no' is not supported; give true or false"),
        ({"clip_sample": True, "clip_sample_range": "x"}, "clip_sample_range='x' is not supported"),
        ({"trained_betas": "x"}, "trained_betas is not supported"),
        ({"thresholding": True}, "thresholding is not supported"),
        ({"betas": 1}, "'betas' is not a setting of LCMScheduler"),
    ],
)
def test_a_wrong_value_of_the_schedule_is_named(scheduler: dict[str, Any], message: str, checkpoints: Path) -> None:
    with pytest.raises(ExportError, match=f"^scheduler: {message}") as error:
        parts_of(checkpoints, scheduler=scheduler)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_end": 0.02},
        {"clip_sample": True, "clip_sample_range": 2.0},
        {"original_inference_steps": 40, "timestep_scaling": 5.0},
    ],
)
def test_the_schedule_is_that_of_diffusers(scheduler: dict[str, Any], checkpoints: Path) -> None:
    own = DDIMScheduler.from_pretrained(checkpoints / "base" / "scheduler")
    config = LCMScheduler.from_config(own.config, **{"beta_schedule": "linear", **scheduler}).config
    for name, value in parts_of(checkpoints, scheduler=scheduler).scheduler.model_dump(exclude_none=True).items():
        assert value == config[name], name
