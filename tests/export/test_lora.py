"""Fused LoRAs, compared with the paper's formula and with diffusers with the LoRA enabled."""

from pathlib import Path

import pytest
import torch
from references import animatediff_pipeline
from safetensors.torch import save_file
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.checkpoints import load_text_encoder, load_unet
from sparsectrl_lcm.export.lora import Lora

RANK, ALPHA = 4, 2.0


def pair(shape: torch.Size, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 4:
        down = torch.randn(RANK, shape[1], *shape[2:], generator=generator)
        return down * 0.1, torch.randn(shape[0], RANK, 1, 1, generator=generator) * 0.1
    return torch.randn(RANK, shape[1], generator=generator) * 0.1, torch.randn(
        shape[0], RANK, generator=generator
    ) * 0.1


def delta(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]) * ALPHA / RANK


def kohya(folder: Path, unet: dict[str, torch.Tensor], text: dict[str, torch.Tensor]) -> tuple[Path, dict, dict]:
    """Writes an LCM-LoRA in its published format: kohya's names, with an alpha for each pair of matrices."""
    tensors: dict[str, torch.Tensor] = {}
    changes: tuple[dict, dict] = ({}, {})
    for prefix, weights, change in (("lora_unet", unet, changes[0]), ("lora_te", text, changes[1])):
        for index, (name, weight) in enumerate(weights.items()):
            down, up = pair(weight.shape, index)
            key = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(ALPHA),
            }
            change[name] = delta(down, up)
    path = folder / "lcm_lora.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path, *changes


def targets(model: torch.nn.Module, endings: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {
        name: value for name, value in model.state_dict().items() if name.endswith(endings) and "motion" not in name
    }


UNET_TARGETS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "proj_in.weight", "conv1.weight")
TEXT_TARGETS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.7])
def test_fused_weights_follow_the_formula(checkpoints: Path, tmp_path: Path, weight: float) -> None:
    base, motion = str(checkpoints / "base"), str(checkpoints / "motion_adapter")
    unet, text = load_unet(base, motion, []), load_text_encoder(base, [])
    unet_before = {name: value.clone() for name, value in unet.state_dict().items()}
    text_before = {name: value.clone() for name, value in text.state_dict().items()}
    text_named = {f"text_model.{name}": value for name, value in targets(text, TEXT_TARGETS).items()}
    path, unet_change, text_change = kohya(tmp_path, targets(unet, UNET_TARGETS), text_named)

    fused = load_unet(base, motion, [Lora(str(path), weight)]).state_dict()
    assert fused.keys() == unet_before.keys()
    assert len(unet_change) > 20
    for name, before in unet_before.items():
        expected = before + weight * unet_change.get(name, torch.zeros_like(before))
        assert torch.allclose(fused[name], expected, atol=1e-6), name

    fused = load_text_encoder(base, [Lora(str(path), weight)]).state_dict()
    assert fused.keys() == text_before.keys()
    for name, before in text_before.items():
        expected = before + weight * text_change.get(f"text_model.{name}", torch.zeros_like(before))
        assert torch.allclose(fused[name], expected, atol=1e-6), name


def test_two_loras_add_up(checkpoints: Path, tmp_path: Path) -> None:
    base, motion = str(checkpoints / "base"), str(checkpoints / "motion_adapter")
    unet = load_unet(base, motion, [])
    path, change, _ = kohya(tmp_path, targets(unet, UNET_TARGETS), {})
    fused = load_unet(base, motion, [Lora(str(path), 1.0), Lora(str(path), 0.25)]).state_dict()
    for name, difference in change.items():
        assert torch.allclose(fused[name], unet.state_dict()[name] + 1.25 * difference, atol=1e-6)


def test_output_equals_diffusers_with_the_lora_on(checkpoints: Path, tmp_path: Path) -> None:
    base, motion = str(checkpoints / "base"), str(checkpoints / "motion_adapter")
    path, _, _ = kohya(tmp_path, targets(load_unet(base, motion, []), UNET_TARGETS), {})
    pipe = animatediff_pipeline(checkpoints)
    pipe.load_lora_weights(str(path), adapter_name="lcm")
    pipe.set_adapters(["lcm"], [0.8])
    inputs = torch.randn(1, 4, 3, 16, 16), torch.tensor(499), torch.randn(3, 77, 48)
    with torch.no_grad():
        expected = pipe.unet(*inputs).sample
        actual = load_unet(base, motion, [Lora(str(path), 0.8)])(*inputs).sample
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("layers", [["q_proj"], ["fc1"], ["out_proj", "fc2"], ["q_proj", "fc1"]])
def test_a_lora_of_some_layers_of_the_text_encoder(checkpoints: Path, tmp_path: Path, layers: list[str]) -> None:
    base = str(checkpoints / "base")
    text = load_text_encoder(base, [])
    endings = tuple(f"{name}.weight" for name in layers)
    named = {f"text_model.{name}": value for name, value in targets(text, endings).items()}
    path, _, change = kohya(tmp_path, {}, named)
    fused = load_text_encoder(base, [Lora(str(path))]).state_dict()
    for name, before in text.state_dict().items():
        expected = before + change.get(f"text_model.{name}", torch.zeros_like(before))
        assert torch.allclose(fused[name], expected, atol=1e-6), name


def test_a_lora_that_fits_in_part_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    base, motion = str(checkpoints / "base"), str(checkpoints / "motion_adapter")
    weights = targets(load_unet(base, motion, []), UNET_TARGETS)
    deeper = {
        name.replace("down_blocks.0.attentions.0", "down_blocks.0.attentions.7"): w for name, w in weights.items()
    }
    path, _, _ = kohya(tmp_path, deeper, {})
    with pytest.raises(ExportError, match=r"lora: .* layers fit the unet of the base|does not fit the unet"):
        load_unet(base, motion, [Lora(str(path))])


@pytest.mark.parametrize("text", ["lcm.safetensors=heavy", "=1", "lcm=nan", "lcm=inf"])
def test_a_wrong_weight_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match="^lora: "):
        Lora.parse(text)


def test_parse() -> None:
    assert Lora.parse("org/name") == Lora("org/name", 1.0)
    assert Lora.parse("a=b/lora.safetensors=0.5") == Lora("a=b/lora.safetensors", 0.5)


def test_what_is_no_lora_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    base, motion = str(checkpoints / "base"), str(checkpoints / "motion_adapter")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    for path in (other, damaged, tmp_path / "missing.safetensors"):
        with pytest.raises(ExportError, match="^lora: ") as error:
            load_unet(base, motion, [Lora(str(path))])
        assert "\n" not in str(error.value)
