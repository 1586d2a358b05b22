"""LoRAs in the formats of several trainers, compared with formulas, and refusals of those that cannot be fused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from original_layouts import animatediff
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, write_base, write_motion_adapter
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.checkpoints import load_text_encoder, load_unet
from sparsectrl_lcm.export.lora_files import Lora, read_lora

Tensors = dict[str, torch.Tensor]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV, KOHYA_CONV = "mid_block.resnets.0.conv1", "lora_unet_mid_block_resnets_0_conv1"
TEXT, KOHYA_TEXT = "encoder.layers.0.self_attn.q_proj", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
WIDTH, TEXT_WIDTH = 64, 48


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base"), Architecture(channels=(32, WIDTH), layers=2), 0))


@pytest.fixture(scope="module")
def motion(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("motion")
    return str(write_motion_adapter(folder, Architecture(channels=(32, WIDTH), layers=2), 1))


@pytest.fixture(scope="module")
def plain(base: str, motion: str) -> Tensors:
    return load_unet(base, motion, []).state_dict()


@pytest.fixture(scope="module")
def plain_text(base: str) -> Tensors:
    return load_text_encoder(base, []).state_dict()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, tensors: Tensors) -> str:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return str(path)


def assert_changed(fused: Tensors, plain: Tensors, changes: Tensors) -> None:
    """The named weights differ by `changes`, all others not at all."""
    assert fused.keys() == plain.keys()
    for name, before in plain.items():
        if name.removesuffix(".weight") in changes:
            assert torch.allclose(fused[name], before + changes[name.removesuffix(".weight")], atol=1e-6), name
        else:
            assert torch.equal(fused[name], before), name


def test_alpha_in_the_metadata(base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    """As diffusers' trainers write it; compared with diffusers' own fusing."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False)
    unet.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers, **metadata)
    fused = load_unet(base, motion, [Lora(str(tmp_path / "lora"))]).state_dict()
    unet.fuse_lora()
    unet.unload_lora()
    for name, value in unet.state_dict().items():
        assert torch.allclose(fused[name], value, atol=1e-6), name
    product = layers[f"{LAYER}.lora.up.weight"] @ layers[f"{LAYER}.lora.down.weight"]
    name = f"{LAYER}.weight"
    assert torch.allclose(fused[name] - plain[name], 16 / 4 * product, atol=1e-6)


@pytest.mark.parametrize("name", ["lora_A.default_0.weight", "lora_A.weight"])
def test_names_of_adapters(name: str, base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    down, up = random(4, WIDTH), random(WIDTH, 4, seed=1)
    tensors = {f"unet.{LAYER}.{name}": down, f"unet.{LAYER}.{name.replace('_A', '_B')}": up}
    path = saved(tmp_path / "lora.safetensors", tensors)
    assert_changed(load_unet(base, motion, [Lora(path)]).state_dict(), plain, {LAYER: up @ down})


def test_a_folder_of_peft(base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    down, up = random(4, WIDTH), random(WIDTH, 4, seed=1)
    prefix = f"base_model.model.{LAYER}"
    tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    path = saved(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(ExportError, match="^lora: .* was saved by PEFT, whose adapter_config.json is not beside it"):
        load_unet(base, motion, [Lora(path)])
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["to_q"], "task_type": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for source in (path, str(tmp_path)):
        fused = load_unet(base, motion, [Lora(source)]).state_dict()
        assert_changed(fused, plain, {LAYER: 2 / 4 * up @ down})


@pytest.mark.parametrize("written", ["wrapped", "bare"])
@pytest.mark.parametrize("part", ["to_q", "to_out.0"])
def test_original_motion_loras(part: str, written: str, base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    layer = f"down_blocks.1.motion_modules.0.transformer_blocks.0.attn2.{part}"
    down, up = random(4, WIDTH), random(WIDTH, 4, seed=1)
    (name,) = animatediff({f"{layer}.weight": down})
    name = name.removesuffix(f".{part}.weight") + f".processor.{part.removesuffix('.0')}_lora"
    prefix = "module." if written == "wrapped" else ""
    tensors = {f"{prefix}{name}.down.weight": down, f"{prefix}{name}.up.weight": up}
    path = tmp_path / "v2_lora_ZoomIn.ckpt"
    torch.save({"state_dict": tensors} if prefix else tensors, path)
    fused = load_unet(base, motion, [Lora(str(path), 0.5)]).state_dict()
    assert_changed(fused, plain, {layer: 0.5 * up @ down})


def test_the_original_domain_adapter(base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    """v3_sd15_adapter.ckpt: attention processors of the spatial layers, below the UNet's own names."""
    down, up = random(4, WIDTH), random(WIDTH, 4, seed=1)
    name = LAYER.replace(".to_q", ".processor.to_q_lora")
    tensors = {f"{name}.down.weight": down, f"{name}.up.weight": up}
    torch.save({"state_dict": tensors}, tmp_path / "v3_sd15_adapter.ckpt")
    fused = load_unet(base, motion, [Lora(str(tmp_path / "v3_sd15_adapter.ckpt"))]).state_dict()
    assert_changed(fused, plain, {LAYER: up @ down})


def test_motion_layers_in_names_of_kohya(base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    key = "lora_unet_down_blocks_1_motion_modules_0_transformer_blocks_0_attn2_to_v"
    tensors = kohya(key)
    fused = load_unet(base, motion, [Lora(saved(tmp_path / "motion.safetensors", tensors))]).state_dict()
    product = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    assert_changed(fused, plain, {"down_blocks.1.motion_modules.0.transformer_blocks.0.attn2.to_v": product})


def dora(weight: torch.Tensor, change: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """Liu et al. 2024, eq. 5: the magnitude times the direction of each column of the changed weight."""
    others = [index for index in range(weight.ndim) if index != axis]
    moved = weight + change
    return scale * moved / (moved**2).sum(others, keepdim=True).sqrt()


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_kohya(
    axis: int, strength: float, base: str, motion: str, plain: Tensors, plain_text: Tensors, tmp_path: Path
) -> None:
    """Beside layers without magnitudes in the same file."""
    tensors: Tensors = {}
    expected: Tensors = {}
    for seed, (key, layer, weights) in enumerate(
        [(KOHYA, LAYER, plain), (KOHYA_CONV, CONV, plain), (KOHYA_TEXT, TEXT, plain_text)]
    ):
        weight = weights[f"{layer}.weight"]
        down, up = random(4, *weight.shape[1:], seed=seed), random(weight.shape[0], 4, seed=seed + 9)
        shape = [size if index == axis else 1 for index, size in enumerate(weight.shape)]
        scale = 1 + random(*shape, seed=5)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0), f"{key}.dora_scale": scale}
        tensors[f"{key}.lora_up.weight"] = up.reshape(*up.shape, *(1,) * (weight.ndim - 2))
        change = 2 / 4 * (up @ down.flatten(1)).reshape(weight.shape)
        expected[layer] = strength * (dora(weight, change, scale, axis) - weight)
    plain_key, plain_layer = KOHYA.replace("to_q", "to_v"), LAYER.replace("to_q", "to_v")
    down, up = random(4, WIDTH, seed=20), random(WIDTH, 4, seed=21)
    tensors |= {f"{plain_key}.lora_down.weight": down, f"{plain_key}.lora_up.weight": up}
    expected[plain_layer] = strength * up @ down  # without alpha: the rank
    lora = Lora(saved(tmp_path / "dora.safetensors", tensors), strength)
    assert_changed(load_unet(base, motion, [lora]).state_dict(), plain, expected)
    assert_changed(load_text_encoder(base, [lora]).state_dict(), plain_text, expected)


def kohya(key: str, out: int = WIDTH, into: int = WIDTH, alpha: float | None = 4.0) -> Tensors:
    tensors = {f"{key}.lora_up.weight": random(out, 4), f"{key}.lora_down.weight": random(4, into, seed=1)}
    return tensors | ({} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)})


def test_names_of_latent_diffusion(base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    key = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = kohya(key)
    fused = load_unet(base, motion, [Lora(saved(tmp_path / "ldm.safetensors", tensors))]).state_dict()
    product = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    assert_changed(fused, plain, {LAYER: product})


def test_alphas_and_ranks_that_differ(
    base: str, motion: str, plain: Tensors, plain_text: Tensors, tmp_path: Path
) -> None:
    """In both models, and with a layer that has no alpha: its product is added as it is."""
    layers = {LAYER: (4, 4.0), LAYER.replace("to_q", "to_k"): (2, 1.0), LAYER.replace("to_q", "to_v"): (3, None)}
    layers[LAYER.replace("attn1.to_q", "attn1.to_out.0")] = (4, 8.0)
    places = {"q_proj": (4, 4.0), "k_proj": (4, 1.0), "v_proj": (2, 2.0), "out_proj": (3, None)}
    layers |= {TEXT.replace("q_proj", name): sizes for name, sizes in places.items()}
    layers |= {"encoder.layers.1.mlp.fc1": (4, 3.0), "encoder.layers.1.mlp.fc2": (4, 1.0)}
    tensors, expected = {}, {}
    for seed, (layer, (rank, alpha)) in enumerate(layers.items()):
        text = layer.startswith("encoder.")
        weight = (plain_text if text else plain)[f"{layer}.weight"]
        key = ("lora_te_text_model_" if text else "lora_unet_") + layer.replace(".", "_")
        up, down = random(len(weight), rank, seed=seed), random(rank, weight.shape[1], seed=seed + 50)
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        expected[layer] = (rank if alpha is None else alpha) / rank * up @ down
    lora = Lora(saved(tmp_path / "lora.safetensors", tensors))
    assert_changed(load_text_encoder(base, [lora]).state_dict(), plain_text, expected)
    assert_changed(load_unet(base, motion, [lora]).state_dict(), plain, expected)


def test_alphas_beside_diffusers_names(base: str, motion: str, plain: Tensors, tmp_path: Path) -> None:
    down, up = random(4, WIDTH), random(WIDTH, 4, seed=1)
    tensors = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    path = saved(tmp_path / "lora.safetensors", tensors | {f"unet.{LAYER}.alpha": torch.tensor(1.0)})
    assert_changed(load_unet(base, motion, [Lora(path)]).state_dict(), plain, {LAYER: 1 / 4 * up @ down})


def test_embedded_textual_inversions_are_told(
    base: str, motion: str, plain: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = kohya(KOHYA)
    path = saved(tmp_path / "a.safetensors", tensors | {"bundle_emb.tok.string_to_param.*": torch.ones(2, TEXT_WIDTH)})
    with caplog.at_level(logging.WARNING, "sparsectrl_lcm"):
        fused = load_unet(base, motion, [Lora(path)]).state_dict()
    assert "a.safetensors also holds textual inversions, which are left out: tok" in caplog.text
    product = tensors[f"{KOHYA}.lora_up.weight"] @ tensors[f"{KOHYA}.lora_down.weight"]
    assert_changed(fused, plain, {LAYER: product})


def test_names_with_equals_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "epoch=3-step=100.safetensors"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=f"there is no file '{name}'; give PATH or PATH=WEIGHT"):
        Lora.parse(name)
    (tmp_path / name).touch()
    assert Lora.parse(name) == Lora(name)
    assert Lora.parse(f"{name}=0.5") == Lora(name, 0.5)


t = torch.ones
SD2 = kohya(KOHYA.replace("1_to_q", "2_to_k"), WIDTH, 2 * TEXT_WIDTH)
REFUSED = {
    "is an OFT": {f"{KOHYA}.oft_blocks": t(4, 16, 16)},
    "is a GLoRA": {f"{KOHYA}.{name}.weight": t(4, 4) for name in ("a1", "a2", "b1", "b2")},
    "is an IA3": {f"{KOHYA}.weight": t(64), f"{KOHYA}.on_input": t(())},
    "is a LyCORIS with norms": kohya(KOHYA) | {"lora_unet_mid_block_resnets_0_norm1.w_norm": t(64)},
    "is a full difference": {f"{KOHYA}.diff": t(64, 64), f"{KOHYA}.diff_b": t(64)},
    "is for another model: .*attn2.to_k has 96 channels, the base's 48": kohya(
        KOHYA.replace("1_to_q", "2_to_k"), 64, 96
    ),
    "is a LoRA for Stable Diffusion XL": kohya(KOHYA) | kohya("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    "lacks .*lora_down.weight": {f"{KOHYA}.lora_up.weight": t(64, 4)},
    "lacks .*lora_B.weight": {f"unet.{LAYER}.lora_A.weight": t(4, 64)},
    "mixes the names of two formats": kohya("lora_unet_input_blocks_1_1_proj_in") | kohya("lora_unet_down_blocks_0_x"),
    "dora_scale of .* has shape": kohya(KOHYA) | {f"{KOHYA}.dora_scale": t(3, 1)},
    "is a DoRA in unknown names": kohya(KOHYA) | {"other.dora_scale": t(3, 1)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_fused_is_named(reason: str, base: str, motion: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "given.safetensors", REFUSED[reason])
    with pytest.raises(ExportError, match=f"^lora: .*{reason}") as error:
        load_unet(base, motion, [Lora(path)])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_folders_with_other_names(tmp_path: Path) -> None:
    saved(tmp_path / "my_style.safetensors", kohya(KOHYA))
    assert read_lora(Lora(str(tmp_path))).plain.has("unet")
    saved(tmp_path / "second.safetensors", kohya(KOHYA))
    with pytest.raises(ExportError, match="holds several files of weights; give one of the files"):
        read_lora(Lora(str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="cannot load .*no LoRA is there"):
        read_lora(Lora(str(tmp_path / "empty")))
