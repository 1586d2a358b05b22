"""Original formats as single files: the same weights, bit for bit, as from the folders in diffusers format."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter
from original_layouts import animatediff, ldm_text, ldm_unet, ldm_vae
from safetensors.torch import load_file, save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, write_checkpoints
from sparsectrl_lcm.export import checkpoints, configurations
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.dry_run import dry_run
from sparsectrl_lcm.export.loading import LoadOptions
from sparsectrl_lcm.export.lora_files import Lora, read_lora
from sparsectrl_lcm.export.plan import ExportOptions, read_parts

# the number of heads and the size of groups are not in the shapes of the weights: those of the published files
ARCH = Architecture(channels=(32, 64), layers=2, heads=8, motion_heads=8, groups=32, motion_mid_block=True)
Tensors = dict[str, torch.Tensor]
COMMIT = "c0ffee" + 34 * "0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("folders"), ARCH)


@pytest.fixture(scope="module")
def single_files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in their original layouts."""
    folder = tmp_path_factory.mktemp("files")
    base = base_weights(folders["base"])
    averaged = {name: value * 2 for name, value in base.items() if name.startswith("model.diffusion_model.")}
    base |= {name.replace("model.diffusion_model.", "model_ema.diffusion_model"): v for name, v in averaged.items()}
    files = {"base": folder / "model.safetensors", "ckpt": folder / "model.ckpt"}
    save_file({name: value.contiguous() for name, value in base.items()}, files["base"])
    torch.save({"epoch": 3, "state_dict": base}, files["ckpt"])
    files["motion_adapter"] = folder / "v3_sd15_mm.ckpt"
    motion = animatediff(weights_of(folders["motion_adapter"]), prefix="module.")
    torch.save({"epoch": 1, "global_step": 2, "state_dict": motion}, files["motion_adapter"])
    for kind in ("scribble", "rgb"):
        files[kind] = folder / f"v3_sd15_sparsectrl_{kind}.ckpt"
        config = {"set_noisy_sample_input_to_zero": True, "conditioning_channels": 3 if kind == "scribble" else 4}
        weights = animatediff(weights_of(folders[kind]))
        torch.save({"controlnet": {**weights, "animatediff_config": config}}, files[kind])
    return files


def weights_of(folder: Path) -> Tensors:
    return load_file(next(folder.glob("*.safetensors")))


def base_weights(base: Path) -> Tensors:
    return {
        **ldm_unet(weights_of(base / "unet"), ARCH.layers),
        **ldm_vae(weights_of(base / "vae"), len(ARCH.vae_channels)),
        **ldm_text(weights_of(base / "text_encoder")),
    }


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("written", ["module", "plain", "safetensors", "without positions"])
def test_motion_modules(written: str, middle: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    expected = checkpoints.load_motion_adapter(str(folders["motion_adapter"]))
    state = {name: value for name, value in expected.state_dict().items() if middle or not name.startswith("mid_")}
    path = tmp_path / ("mm.safetensors" if written == "safetensors" else "mm.ckpt")
    prefix = "module." if written == "module" else ""
    tensors = animatediff(state, prefix, positions=written != "without positions")
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if prefix else tensors, path)
    positions = 32
    if not middle:
        expected.mid_block = None
        expected.config.use_motion_mid_block = False
    elif written == "without positions":  # AnimateLCM is published so; its code computes the sines of 64 positions
        positions = 64
        expected = MotionAdapter.from_config(dict(expected.config) | {"motion_max_seq_length": positions})
        expected.load_state_dict({name: value for name, value in state.items() if ".pe" not in name}, strict=False)
    assert_same(checkpoints.load_motion_adapter(str(path)), expected)
    config = configurations.load_motion_config(str(path))
    changed = {"use_motion_mid_block": middle, "motion_max_seq_length": positions}
    settings = configurations.load_motion_config(str(folders["motion_adapter"])) | changed
    same = {name: value for name, value in settings.items() if not name.startswith("_")}
    assert {name: config[name] for name in same} == same


def test_the_number_of_positions_is_read_from_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    state = weights_of(folders["motion_adapter"])
    short = {name: value[:, :24] if name.endswith(".pe") else value for name, value in state.items()}
    torch.save(animatediff(short), tmp_path / "mm_sd_v15.ckpt")
    assert configurations.load_motion_config(str(tmp_path / "mm_sd_v15.ckpt"))["motion_max_seq_length"] == 24
    changed = animatediff(state)
    name = next(name for name in changed if name.endswith("attention_blocks.1.pos_encoder.pe"))
    torch.save(changed | {name: changed[name] + 1}, tmp_path / "mixed.ckpt")
    with pytest.raises(ExportError, match="motion_adapter: .* have different positions"):
        checkpoints.load_motion_adapter(str(tmp_path / "mixed.ckpt"))


@pytest.mark.parametrize("kind", ["scribble", "rgb"])
def test_sparsectrl(kind: str, folders: dict[str, Path], single_files: dict[str, Path]) -> None:
    file, folder = str(single_files[kind]), str(folders[kind])
    assert_same(checkpoints.load_controlnet(kind, file), checkpoints.load_controlnet(kind, folder))
    theirs = configurations.load_controlnet_config(kind, folder)
    ours = configurations.load_controlnet_config(kind, file)
    unused = {"conditioning_embedding_out_channels"} if kind == "rgb" else set()
    for name in theirs.keys() - unused:
        assert name.startswith("_") or ours[name] == theirs[name], name


@pytest.mark.parametrize("written", ["base", "ckpt"])
def test_a_base_in_one_file(written: str, folders: dict[str, Path], single_files: dict[str, Path]) -> None:
    """The weights that were not averaged are taken, as diffusers does."""
    file, folder, motion = str(single_files[written]), str(folders["base"]), str(folders["motion_adapter"])
    options = LoadOptions(base_config=folder)
    assert_same(checkpoints.load_unet(file, motion, [], options), checkpoints.load_unet(folder, motion, []))
    assert_same(checkpoints.load_text_encoder(file, [], options), checkpoints.load_text_encoder(folder, []))
    assert_same(checkpoints.load_vae(file, None, options), checkpoints.load_vae(folder, None))
    assert_same(checkpoints.load_vae(folder, file, options), checkpoints.load_vae(folder, None))


def test_a_vae_in_a_file_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    vae = weights_of(folders["base"] / "vae")
    bare = {name.removeprefix("first_stage_model."): value for name, value in ldm_vae(vae, 4).items()}
    torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(1)}}, tmp_path / "mse.ckpt")
    save_file(vae, tmp_path / "vae.safetensors")
    expected = checkpoints.load_vae(str(folders["base"]), None)
    for name in ("mse.ckpt", "vae.safetensors"):
        assert_same(checkpoints.load_vae(str(folders["base"]), str(tmp_path / name)), expected)


def options_of(paths: dict[str, Path], **more: Any) -> ExportOptions:
    controlnets = {kind: str(paths[kind]) for kind in ("scribble", "rgb")}
    return ExportOptions(str(paths["base"]), str(paths["motion_adapter"]), controlnets, **more)


def test_single_files_are_planned_as_folders_are(folders: dict[str, Path], single_files: dict[str, Path]) -> None:
    parts = read_parts(options_of(single_files, base_config=str(folders["base"])))
    expected = read_parts(options_of(folders))
    for name in ("sizes", "scheduler", "vocabulary", "max_tokens", "text_width", "channels", "layers"):
        assert getattr(parts, name) == getattr(expected, name), name


def test_marks_of_how_a_base_was_trained(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = {name: value.contiguous() for name, value in base_weights(folders["base"]).items()}
    path, options = tmp_path / "v.safetensors", LoadOptions(str(folders["base"]))
    save_file(weights | {"v_pred": torch.zeros(0)}, path)
    assert configurations.load_lcm_config(str(path), {}, options)["prediction_type"] == "v_prediction"
    given = {"prediction_type": "epsilon"}
    assert configurations.load_lcm_config(str(path), given, options)["prediction_type"] == "epsilon"
    save_file(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    with pytest.raises(ExportError, match="base: .* was trained with zero terminal SNR, which is not supported"):
        configurations.load_lcm_config(str(path), {}, options)


def hub_cache(folder: Path, name: str, files: Path) -> None:
    """Lays files out as a repository in the hub's cache."""
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(files, repository / "snapshots" / COMMIT)


def test_names_on_the_hub(
    folders: dict[str, Path], single_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository, one that holds only fp16 weights, a file of a repository, and a LoRA, all from the hub's cache."""
    for module in ("huggingface_hub.constants", "diffusers.models.modeling_utils", "diffusers.configuration_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    hub_cache(tmp_path, "owner/plain", folders["motion_adapter"])
    hub_cache(tmp_path, "owner/fp16", folders["motion_adapter"])
    hub_cache(tmp_path, "owner/file", single_files["motion_adapter"].parent)
    weights = tmp_path / "models--owner--fp16" / "snapshots" / COMMIT / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    expected = checkpoints.load_motion_adapter(str(folders["motion_adapter"]))
    for source in ("owner/plain", "owner/fp16", "owner/file/v3_sd15_mm.ckpt"):
        assert_same(checkpoints.load_motion_adapter(source), expected)
    with pytest.raises(ExportError, match="^motion_adapter: cannot load 'owner/file/nothing.ckpt'"):
        checkpoints.load_motion_adapter("owner/file/nothing.ckpt")
    (tmp_path / "lora").mkdir()
    tensors = {"unet.x.lora_A.weight": torch.ones(4, 2), "unet.x.lora_B.weight": torch.ones(2, 4)}
    save_file(tensors, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    hub_cache(tmp_path, "owner/lora", tmp_path / "lora")
    assert read_lora(Lora("owner/lora")).plain.tensors.keys() == tensors.keys()


def test_a_dry_run_says_what_each_file_is(folders: dict[str, Path], single_files: dict[str, Path]) -> None:
    lines = list(dry_run(options_of(single_files, base_config=str(folders["base"]))))
    for expected in (
        "base model.safetensors: a Stable Diffusion 1.5 checkpoint, ",
        "motion_adapter v3_sd15_mm.ckpt: motion modules, ",
        "controlnet_rgb v3_sd15_sparsectrl_rgb.ckpt: an original SparseCtrl, ",
        "clips: 128x128, sides in multiples of 8; 16 frames, at most 32",
        "schedule: LCM, 50 original steps",
        "graph unet: ",
        "graph vae_decoder: ",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("conditioner.embedders.0.x", "base", "holds a Stable Diffusion XL checkpoint; give a Stable Diffusion 1.5"),
        ("cond_stage_model.model.x", "base", "holds a Stable Diffusion 2 checkpoint"),
        ("lora_unet_mid.lora_up.weight", "base", "holds a LoRA in kohya's names"),
        ("model.diffusion_model.input_blocks.0.0.weight", "motion_adapter", "holds a Stable Diffusion 1.5 checkpoint"),
        ("down_blocks.0.motion_modules.0.x", "controlnet_rgb", "holds motion modules; give a SparseCtrl"),
    ],
)
def test_another_kind_of_file_is_named(
    name: str, part: str, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "given.safetensors"
    save_file({name: torch.zeros(2)}, path)
    with pytest.raises(ExportError, match=f"^{part}: .*{message}"):
        match part:
            case "base":
                checkpoints.load_unet(str(path), str(folders["motion_adapter"]), [], LoadOptions(str(folders["base"])))
            case "motion_adapter":
                configurations.load_motion_config(str(path))
            case _:
                configurations.load_controlnet_config("rgb", str(path))


def test_a_base_without_a_vae_needs_one(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = {name: value.contiguous() for name, value in base_weights(folders["base"]).items()}
    path = tmp_path / "no_vae.safetensors"
    save_file({name: value for name, value in weights.items() if not name.startswith("first_")}, path)
    with pytest.raises(ExportError, match="^base: .* without a VAE; give a VAE with --vae"):
        checkpoints.load_vae(str(path), None, LoadOptions(str(folders["base"])))
