"""LoHa, LoKr and LoCon with CP decomposition, compared with PEFT's layers and with torch's convolutions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from safetensors.torch import save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, write_base, write_motion_adapter
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.checkpoints import load_text_encoder, load_unet
from sparsectrl_lcm.export.lora_files import Lora
from torch import nn

Tensors = dict[str, torch.Tensor]
LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"
POINT = "mid_block.attentions.0.proj_in"
TEXT = "encoder.layers.0.self_attn.q_proj"
ALPHA, RANK = 3.0, 2


@dataclass(frozen=True)
class Model:
    base: str
    motion: str
    unet: Tensors
    text: Tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder, arch = tmp_path_factory.mktemp("model"), Architecture(channels=(32, 64))
    base, motion = str(write_base(folder / "base", arch, 0)), str(write_motion_adapter(folder / "motion", arch, 1))
    return Model(base, motion, load_unet(base, motion, []).state_dict(), load_text_encoder(base, []).state_dict())


def key_of(layer: str) -> str:
    prefix = "lora_te_text_model_" if layer == TEXT else "lora_unet_"
    return prefix + layer.replace(".", "_")


def module_like(weight: torch.Tensor) -> nn.Module:
    if weight.ndim == 2:
        return nn.Linear(weight.shape[1], weight.shape[0])
    return nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=weight.shape[2] // 2)


def peft_layer(kind: Any, weight: torch.Tensor, **options: Any) -> tuple[Tensors, torch.Tensor]:
    """Factors and change of one of PEFT's layers with random weights."""
    base = module_like(weight)
    config = (LoHaConfig if kind is loha else LoKrConfig)(init_weights=False, **options)
    torch.manual_seed(weight.numel())
    layer = (kind.Linear if weight.ndim == 2 else kind.Conv2d)(base, "default", config=config, r=RANK, alpha=ALPHA)
    factors = {name.partition(".")[0]: value for name, value in layer.named_parameters() if ".default" in name}
    for value in factors.values():
        nn.init.normal_(value, std=0.3)
    factors = {name: value.detach() for name, value in factors.items()}
    return factors, layer.get_delta_weight("default").detach()


CASES = {
    "loha": (loha, {"use_effective_conv2d": False}),
    "loha with cores": (loha, {"use_effective_conv2d": True}),
    "lokr": (lokr, {"use_effective_conv2d": False}),
    "lokr with cores": (lokr, {"use_effective_conv2d": True}),
    "lokr of four": (lokr, {"decompose_both": True, "decompose_factor": 8, "use_effective_conv2d": False}),
    "lokr with w1 of two": (lokr, {"decompose_both": True, "decompose_factor": 16, "use_effective_conv2d": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_of_peft_in_names_of_kohya(case: str, model: Model, tmp_path: Path) -> None:
    """Linear, convolution, convolution of one pixel, text encoder; beside a plain layer in the same file."""
    kind, options = CASES[case]
    tensors, changes = {}, {}
    for layer in (LINEAR, CONV, POINT, TEXT):
        weight = (model.text if layer == TEXT else model.unet)[f"{layer}.weight"]
        factors, changes[layer] = peft_layer(kind, weight, **options)
        tensors |= {f"{key_of(layer)}.{name}": value.contiguous() for name, value in factors.items()}
        tensors[f"{key_of(layer)}.alpha"] = torch.tensor(ALPHA)
    plain = LINEAR.replace("to_q", "to_v")
    down, up = 0.3 * torch.randn(4, 64), 0.3 * torch.randn(64, 4)
    tensors |= {f"{key_of(plain)}.lora_down.weight": down, f"{key_of(plain)}.lora_up.weight": up}
    changes[plain] = up @ down
    save_file(tensors, tmp_path / "style.safetensors")
    loras = [Lora(str(tmp_path / "style.safetensors"), 0.5)]
    check(load_unet(model.base, model.motion, loras).state_dict(), model.unet, changes, 0.5)
    check(load_text_encoder(model.base, loras).state_dict(), model.text, {TEXT: changes[TEXT]}, 0.5)


def check(fused: Tensors, before: Tensors, changes: Tensors, strength: float) -> None:
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        if layer in changes:
            assert changes[layer].abs().max() > 1e-3
            assert (fused[name] - weight - strength * changes[layer]).abs().max() <= 1e-6, name
        else:
            assert torch.equal(fused[name], weight), name


def test_two_whole_matrices_of_lokr_have_no_alpha(model: Model, tmp_path: Path) -> None:
    """LyCORIS writes a meaningless alpha then."""
    w1, w2 = 0.3 * torch.randn(8, 4), torch.randn(8, 16, 3, 3)
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e10)}
    save_file({f"{key_of(CONV)}.{name}": value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    fused = load_unet(model.base, model.motion, [Lora(str(tmp_path / "a.safetensors"))])
    expected = torch.stack(
        [torch.kron(w1, w2[:, :, row, column]) for row in range(3) for column in range(3)], -1
    ).reshape(64, 64, 3, 3)
    check(fused.state_dict(), model.unet, {CONV: expected}, 1.0)


def test_cp_decomposition(model: Model, tmp_path: Path) -> None:
    """Three convolutions after one another are the convolution that is added."""
    down, mid, up = (0.3 * torch.randn(*shape) for shape in ((4, 64, 1, 1), (4, 4, 3, 3), (64, 4, 1, 1)))
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{key_of(CONV)}.{name}": value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    fused = load_unet(model.base, model.motion, [Lora(str(tmp_path / "a.safetensors"))])
    pixels = torch.eye(64).reshape(64, 64, 1, 1)  # one pixel of each channel gives the whole kernel, mirrored
    chain = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(pixels, down), mid, padding=2), up)
    expected = 2 / 4 * chain.flip(2, 3).transpose(0, 1)
    check(fused.state_dict(), model.unet, {CONV: expected}, 1.0)


def test_dora_of_a_loha(model: Model, tmp_path: Path) -> None:
    weight = model.unet[f"{LINEAR}.weight"]
    factors, change = peft_layer(loha, weight)
    scale = 1 + 0.3 * torch.randn(64, 1)
    tensors = {**factors, "alpha": torch.tensor(ALPHA), "dora_scale": scale}
    save_file({f"{key_of(LINEAR)}.{name}": value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    fused = load_unet(model.base, model.motion, [Lora(str(tmp_path / "a.safetensors"))])
    moved = weight + change
    expected = scale * moved / (moved**2).sum(1, keepdim=True).sqrt() - weight
    check(fused.state_dict(), model.unet, {LINEAR: expected}, 1.0)


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_folders_of_peft(kind: Any, model: Model, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(model.base, subfolder="unet")
    targets = ["to_q", "conv1"]
    config = kind(
        r=RANK, alpha=ALPHA, target_modules=targets, init_weights=False, alpha_pattern={"conv1": 1.0},
        rank_pattern={"mid_block.resnets.0.conv1": 1},
    )  # fmt: skip
    adapted = peft.get_peft_model(unet, config)
    adapted.save_pretrained(tmp_path)
    fused = load_unet(model.base, model.motion, [Lora(str(tmp_path))]).state_dict()
    merged = adapted.merge_and_unload().state_dict()
    assert not torch.equal(merged[f"{CONV}.weight"], model.unet[f"{CONV}.weight"])
    for name, value in merged.items():
        assert (fused[name] - value).abs().max() <= 1e-6, name


K = key_of(LINEAR)
REFUSED = {
    "lacks .*hada_w2_a": {f"{K}.hada_w1_a": torch.ones(64, 2), f"{K}.hada_w1_b": torch.ones(2, 64)},
    "is for another model: .* does not have the shape": {
        f"{K}.lokr_w1": torch.ones(2, 2),
        f"{K}.lokr_w2": torch.ones(64, 64),
    },
    r"another model: .* does not have the shape \(64, 64\)": {
        f"{K}.lokr_w1": torch.ones(1, 4),
        f"{K}.lokr_w2": torch.ones(32, 32),
    },
    "does not have the shape": {
        f"{K}.hada_w1_a": torch.ones(2),
        f"{K}.hada_w1_b": torch.ones(2),
        f"{K}.hada_w2_a": torch.ones(2),
        f"{K}.hada_w2_b": torch.ones(2),
    },
    "for another model": {
        f"{K}.hada_w1_a": torch.ones(64, 2),
        f"{K}.hada_w1_b": torch.ones(2, 64),
        f"{K}.hada_w2_a": torch.ones(64, 2),
        f"{K}.hada_w2_b": torch.ones(2, 64),
        f"{K}.alpha": torch.ones(2),
    },
    "has rank 0": {
        f"{K}.hada_w1_a": torch.ones(64, 0),
        f"{K}.hada_w1_b": torch.ones(0, 64),
        f"{K}.hada_w2_a": torch.ones(64, 0),
        f"{K}.hada_w2_b": torch.ones(0, 64),
        f"{K}.alpha": torch.tensor(1.0),
    },
    "only 0 of 1 layers fit the unet": {"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2)},
    "hada_w3, which is not supported": {f"{K}.hada_w3": torch.ones(2, 2)},
    "is a LyCORIS in unknown names": {"x.hada_w1_a": torch.ones(2, 2)},
    "is a LyCORIS in the names of the original": {"lora_unet_input_blocks_1_1_proj_in.hada_w1_a": torch.ones(2, 2)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_named(reason: str, model: Model, tmp_path: Path) -> None:
    save_file(REFUSED[reason], tmp_path / "given.safetensors")
    with pytest.raises(ExportError, match=f"^lora: .*{reason}") as error:
        load_unet(model.base, model.motion, [Lora(str(tmp_path / "given.safetensors"))])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
