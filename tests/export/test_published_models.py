"""What export sets by itself: the norms of AnimateDiff v1, and AnimateLCM's steps, positions and LoRA weight."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from diffusers import MotionAdapter
from original_layouts import animatediff
from safetensors.torch import save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, randomize, write_base, write_controlnet
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.checkpoints import load_motion_adapter
from sparsectrl_lcm.export.dry_run import dry_run
from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.lora_files import Lora
from sparsectrl_lcm.export.motion_module import replace_motion_module
from sparsectrl_lcm.export.plan import ExportOptions, Parts, read_parts

ARCH = Architecture(channels=(32, 64), heads=8, motion_heads=8, groups=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", ARCH, 0)


def adapter(channels: tuple[int, ...] = ARCH.channels, **settings: Any) -> MotionAdapter:
    settings = {"motion_num_attention_heads": 8, "motion_norm_num_groups": 32, **settings}
    return randomize(MotionAdapter(channels, motion_layers_per_block=1, **settings), 1)


def write_motion(path: Path, positions: bool = True, middle: bool = False, count: int = 32) -> Path:
    """Writes motion modules in AnimateDiff's own layout."""
    state = adapter(use_motion_mid_block=middle, motion_max_seq_length=count).state_dict()
    torch.save(animatediff(state, "module.", positions), path)
    return path


def parts_of(base: Path, motion: Path, **options: Any) -> Parts:
    return read_parts(ExportOptions(str(base), str(motion), **options))


def test_v1_is_told_by_its_positions_and_its_middle_block(base: Path, tmp_path: Path) -> None:
    for middle, count, norm in ((False, 24, "resnet-clip"), (False, 32, "frame"), (True, 24, "frame")):
        motion = write_motion(tmp_path / f"{middle}{count}.ckpt", middle=middle, count=count)
        parts = parts_of(base, motion)
        assert (parts.temporal_norm, parts.sizes.max_frames) == (norm, count)
        told = [line for line in parts.choices if "temporal norm" in line]
        assert told == (
            ["temporal norm resnet-clip: AnimateDiff v1 (24 positions, no middle block)"] * (norm != "frame")
        )
    folder = tmp_path / "mm-v1-4"
    adapter(use_motion_mid_block=False, motion_max_seq_length=24).save_pretrained(folder)
    assert parts_of(base, folder).temporal_norm == "resnet-clip"
    for norm in ("frame", "clip"):
        parts = parts_of(base, folder, temporal_norm=norm)
        assert (parts.temporal_norm, parts.choices) == (norm, ())


def test_animatelcm_in_its_own_file(base: Path, tmp_path: Path) -> None:
    """The published file has no positions. Its code has the sines of 64, as diffusers computes them."""
    motion = write_motion(tmp_path / "AnimateLCM_sd15_t2v.ckpt", positions=False, middle=True)
    loaded, expected = load_motion_adapter(str(motion)).state_dict(), adapter(motion_max_seq_length=64).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items() if name.endswith(".pe"))
    parts = parts_of(base, motion, frames=64)
    assert (parts.scheduler.original_inference_steps, parts.sizes.max_frames, parts.temporal_norm) == (100, 64, "frame")
    assert parts.choices == ("original_inference_steps 100: the motion modules are AnimateLCM's",)
    control = write_controlnet(tmp_path / "scribble", ARCH, "scribble", 2)  # has 32 positions
    with pytest.raises(ExportError, match="frames: 64 is out of range; the motion modules allow 1 to 32"):
        parts_of(base, motion, frames=64, controlnets={"scribble": str(control)})
    parts = parts_of(base, motion, scheduler={"original_inference_steps": 50})
    assert (parts.scheduler.original_inference_steps, parts.choices) == (50, ())


@pytest.mark.parametrize(
    ("name", "middle", "count", "steps"),
    [
        ("wangfuyun/AnimateLCM", True, 32, 100),
        ("models--wangfuyun--AnimateLCM/snapshots/c0ffee", True, 32, 100),
        ("longanimatediff-32", True, 64, 50),
        ("AnimateLCM/mm_sd_v15_v2", True, 32, 50),
    ],
)
def test_animatelcm_under_other_names(
    name: str, middle: bool, count: int, steps: int, base: Path, tmp_path: Path
) -> None:
    """In diffusers format its settings are those of v2, so its name tells. LongAnimateDiff's has 64 positions."""
    folder = tmp_path / name
    adapter(use_motion_mid_block=middle, motion_max_seq_length=count).save_pretrained(folder)
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        assert parts_of(base, source).scheduler.original_inference_steps == steps


@pytest.mark.parametrize(("positions", "middle", "steps"), [(False, True, 100), (True, True, 50), (False, False, 50)])
def test_animatelcm_in_its_own_file_under_another_name(
    positions: bool, middle: bool, steps: int, base: Path, tmp_path: Path
) -> None:
    """No other published file with a middle block lacks the positions; LongAnimateDiff's holds 64."""
    motion = write_motion(tmp_path / "renamed.ckpt", positions, middle, count=64)
    assert parts_of(base, motion).scheduler.original_inference_steps == steps


def test_the_weight_of_animatelcms_lora() -> None:
    names = {
        "AnimateLCM_sd15_t2v_lora.safetensors": 0.8,
        "wangfuyun/AnimateLCM": 0.8,
        "sd15_lora_beta.safetensors": 0.8,
        "AnimateLCM_sd15_t2v_lora.safetensors=1.0": 1.0,
        "latent-consistency/lcm-lora-sdv1-5": 1.0,
    }
    assert {name: Lora.parse(name).weight for name in names} == names


def test_a_dry_run_tells_what_is_set_by_itself(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "AnimateLCM_sd15_t2v_lora.safetensors"
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {f"{layer}.lora_down.weight": torch.ones(2, 64, 1, 1), f"{layer}.lora_up.weight": torch.ones(64, 2, 1, 1)}, lora
    )
    motion = write_motion(tmp_path / "mm_sd_v14.ckpt", count=24)
    lines = list(dry_run(ExportOptions(str(base), str(motion), loras=(Lora.parse(str(lora)),))))
    assert "temporal norm resnet-clip: AnimateDiff v1 (24 positions, no middle block)" in lines
    assert "lora weight 0.8: AnimateLCM_sd15_t2v_lora.safetensors is AnimateLCM's" in lines
    assert any("16 frames, at most 24; temporal norm resnet-clip" in line for line in lines)


def test_an_export_tells_what_is_set_by_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the long work begins."""

    def stop(jobs: object) -> None:
        raise ExportError("export", "stopped")

    monkeypatch.setattr("sparsectrl_lcm.export.exporter.open_sources", stop)
    motion = write_motion(tmp_path / "AnimateLCM_sd15_t2v.ckpt", positions=False, middle=True)
    told: list[str] = []
    with pytest.raises(ExportError, match="stopped"):
        export_bundle(ExportOptions(str(base), str(motion)), tmp_path / "bundle", on_choice=told.append)
    assert told == ["original_inference_steps 100: the motion modules are AnimateLCM's"]


@pytest.mark.parametrize(
    ("exported", "positions", "message"),
    [
        ("frame", 24, "needs temporal norm resnet-clip, the bundle has frame; export the bundle again"),
        ("resnet-clip", 32, "needs temporal norm frame, the bundle has resnet-clip; export the bundle again"),
    ],
)
def test_motion_modules_of_other_norms_are_not_swapped_in(
    exported: str, positions: int, message: str, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(ROOT / "runtime" / "demo_bundle", tmp_path / "demo"))
    manifest = bundle / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "temporal_norm": exported}))
    settings = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 8, "motion_max_seq_length": positions}
    adapter((32, 48, 64), use_motion_mid_block=False, **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=message) as error:
        replace_motion_module(str(tmp_path / "adapter"), bundle)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_the_schedule_follows_a_swap(tmp_path: Path) -> None:
    """AnimateLCM brings its 100 original steps; another motion module takes them away; a chosen number stays."""
    bundle = Path(shutil.copytree(ROOT / "runtime" / "demo_bundle", tmp_path / "demo"))
    settings = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 8, "use_motion_mid_block": False}
    for name in ("AnimateLCM", "other"):
        adapter((32, 48, 64), **settings).save_pretrained(tmp_path / name)
    assert replace_motion_module(str(tmp_path / "AnimateLCM"), bundle)[0].scheduler.original_inference_steps == 100
    assert replace_motion_module(str(tmp_path / "other"), bundle)[0].scheduler.original_inference_steps == 50
    manifest = bundle / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"original_inference_steps": 50', '"original_inference_steps": 40')
    )
    assert replace_motion_module(str(tmp_path / "AnimateLCM"), bundle)[0].scheduler.original_inference_steps == 40
