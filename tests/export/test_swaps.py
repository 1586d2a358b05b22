"""Other LoRAs and SparseCtrls for an existing bundle: the demo bundle and the checkpoints it was exported from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import SparseControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, randomize, write_checkpoints
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.checkpoints import load_text_encoder, load_unet
from sparsectrl_lcm.export.controlnet_swap import replace_controlnets
from sparsectrl_lcm.export.embeddings import Embedding
from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.lora_files import Lora
from sparsectrl_lcm.export.lora_swap import replace_loras
from sparsectrl_lcm.export.motion_module import replace_motion_module
from sparsectrl_lcm.export.options import ExportOptions
from sparsectrl_lcm.export.swap import Swap
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.errors import BundleError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.manifest import Manifest, read_manifest

from sparsectrl_lcm import cli

TRAINED = ROOT / "demo" / "trained"
BASE, MOTION = str(TRAINED / "base"), str(TRAINED / "motion_adapter")
LAYERS = {
    "lora_unet_down_blocks_0_resnets_0_conv1": "unet down_blocks.0.resnets.0.conv1",
    "lora_unet_down_blocks_0_motion_modules_0_transformer_blocks_0_attn1_to_q": (
        "unet down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "text_encoder encoder.layers.0.mlp.fc1",
}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "runtime" / "demo_bundle", tmp_path / "demo"))


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def changed_files(bundle: Path, before: dict[str, bytes]) -> set[str]:
    now = contents(bundle)
    assert now.keys() == before.keys()
    return {name for name, data in now.items() if data != before[name]}


def weights_of(bundle: Path, graph: str) -> dict[str, torch.Tensor]:
    """The weights of a graph by name, as in its checkpoint."""
    swap = Swap(bundle, read_manifest(bundle), None)
    files = swap.manifest.graphs[graph].weights
    return {name: swap.read(file, place) for file in files for name, place in swap.weights(graph, file)}


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of kohya's format for convolution, motion module and text encoder."""
    models = {"unet": load_unet(BASE, MOTION, []), "text_encoder": load_text_encoder(BASE, [])}
    tensors: dict[str, torch.Tensor] = {}
    for key, place in LAYERS.items():
        part, name = place.split()
        weight = models[part].get_submodule(name).weight
        down = torch.randn(2, *weight.shape[1:], generator=torch.Generator().manual_seed(1))
        up = 0.2 * torch.randn(weight.shape[0], 2, *(1,) * (weight.ndim - 2))
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    save_file(tensors, path)
    return path


def test_loras_are_fused_and_taken_out_again(demo: Path, style: Path, tmp_path: Path) -> None:
    before = contents(demo)
    old = {graph: weights_of(demo, graph) for graph in ("unet", "text_encoder")}
    replace_loras(demo, [Lora(str(style), 0.5)], BASE, MOTION)
    files = {f"onnx/{name}.weights" for name in ("unet", "unet.motion", "text_encoder")}
    assert changed_files(demo, before) == {"manifest.json", *files}
    manifest = Bundle.load(demo).manifest
    assert manifest.sources["lora_0"] == "style.safetensors=0.5"
    assert manifest.trained_for is None, "the LoRA may know other words"
    factors = load_file(style)
    changes = {
        tuple(place.split()): 0.5
        * (factors[f"{key}.lora_up.weight"].flatten(1) @ factors[f"{key}.lora_down.weight"].flatten(1))
        for key, place in LAYERS.items()
    }
    for graph, weights in old.items():
        for name, value in weights_of(demo, graph).items():
            layer = name.removesuffix(".weight").removeprefix("text_model.")
            if (graph, layer) in changes:
                change = changes[graph, layer].reshape(value.shape)
                assert (value - weights[name] - change).abs().max() <= 1e-6
                del changes[graph, layer]
            else:
                assert torch.equal(value, weights[name]), name
    assert not changes

    one = VideoPipeline.load(demo, "onnxruntime").generate("a red star", num_frames=2, num_inference_steps=1, seed=1)
    replace_loras(demo, [], BASE, MOTION, output=tmp_path / "new" / "bundle")
    Bundle.load(tmp_path / "new/bundle")
    assert contents(tmp_path / "new/bundle").keys() == before.keys()
    assert changed_files(tmp_path / "new/bundle", before) <= {"manifest.json"}
    assert not list((tmp_path / "new").glob(".*"))
    two = VideoPipeline.load(tmp_path / "new/bundle", "onnxruntime").generate(
        "a red star", num_frames=2, num_inference_steps=1, seed=1
    )
    assert (one.frames != two.frames).any()


@pytest.mark.slow
def test_a_changed_bundle_is_that_of_a_fresh_export(tmp_path: Path) -> None:
    """Other motion modules, LoRAs and SparseCtrl, one after another: every file and the frames. Embeddings stay."""
    arch = Architecture(channels=(16, 32), sample_size=8, control_channels=(8, 8))
    parts = write_checkpoints(tmp_path / "first", arch)
    others = write_checkpoints(tmp_path / "second", arch, seed=50)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{key}.hada_w{side}": 0.3 * torch.ones(32, 2) for side in ("1_a", "2_a")}
    factors |= {f"{key}.hada_w{side}": 0.3 * torch.ones(2, 32) for side in ("1_b", "2_b")}
    key = "lora_te_text_model_encoder_layers_0_mlp_fc2"
    factors |= {f"{key}.lora_down.weight": torch.ones(2, 192), f"{key}.lora_up.weight": 0.1 * torch.ones(48, 2)}
    save_file(factors, tmp_path / "style.safetensors")
    lora = Lora(str(tmp_path / "style.safetensors"), 0.7)
    save_file({"emb_params": torch.randn(2, 48)}, tmp_path / "Style.safetensors")
    words = (Embedding(str(tmp_path / "Style.safetensors"), "bird"),)

    def export(motion: Path, scribble: Path, loras: tuple[Lora, ...], name: str) -> Path:
        options = ExportOptions(str(parts["base"]), str(motion), {"scribble": str(scribble)}, loras, words)
        export_bundle(options, tmp_path / name)
        return tmp_path / name

    changed = export(parts["motion_adapter"], parts["scribble"], (), "changed")
    fresh = export(others["motion_adapter"], others["scribble"], (lora,), "fresh")
    replace_motion_module(str(others["motion_adapter"]), changed)
    replace_controlnets(changed, {"scribble": str(others["scribble"])})
    replace_loras(changed, [lora], str(parts["base"]), str(others["motion_adapter"]))
    assert changed_files(changed, contents(fresh)) <= {"manifest.json"}
    assert read_manifest(changed).sources == read_manifest(fresh).sources
    one, two = (
        VideoPipeline.load(bundle, "onnxruntime").generate("a bird", num_frames=2, num_inference_steps=1, seed=1)
        for bundle in (changed, fresh)
    )
    np.testing.assert_array_equal(one.frames, two.frames)


def sparsectrl(kind: str, folder: Path, seed: int, **changes: object) -> str:
    """Writes random weights in the architecture of the demo model's SparseCtrl, or in a changed one."""
    config = SparseControlNetModel.load_config(TRAINED / kind) | changes
    randomize(SparseControlNetModel.from_config(config), seed).save_pretrained(folder)
    return str(folder)


def test_sparsectrls_are_replaced(demo: Path, tmp_path: Path) -> None:
    """And by the old ones again: then every file is as the export wrote it."""
    before = contents(demo)
    given = {kind: sparsectrl(kind, tmp_path / kind, seed) for seed, kind in enumerate(("scribble", "rgb"))}
    manifest, _ = replace_controlnets(demo, given)
    assert changed_files(demo, before) == {"manifest.json", *(f"onnx/controlnet_{kind}.weights" for kind in given)}
    Bundle.load(demo)
    for kind, source in given.items():
        expected = SparseControlNetModel.from_pretrained(source).state_dict()
        found = weights_of(demo, f"controlnet_{kind}")
        assert len(found) > 100
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
        assert 0 < manifest.graphs[f"controlnet_{kind}"].max_error <= 1e-4
    replace_controlnets(demo, {kind: str(TRAINED / kind) for kind in given})
    assert changed_files(demo, before) <= {"manifest.json"}


def test_what_does_not_fit_is_refused_and_changes_nothing(demo: Path, style: Path, tmp_path: Path) -> None:
    before = contents(demo)
    heads = sparsectrl("scribble", tmp_path / "heads", 1, attention_head_dim=2)
    with pytest.raises(ExportError, match=r"controlnet_scribble: .*heads.* has other heads, groups or colours than"):
        replace_controlnets(demo, {"scribble": heads})
    with pytest.raises(ExportError, match="controlnet_scribble: .* is a SparseCtrl for rgb; give it as rgb"):
        replace_controlnets(demo, {"scribble": str(TRAINED / "rgb")})
    with pytest.raises(ExportError, match="has shape|has other layers or channels than the bundle's"):
        replace_controlnets(
            demo, {"scribble": sparsectrl("scribble", tmp_path / "wide", 1, block_out_channels=[32, 48, 32])}
        )
    other = tmp_path / "base"
    shutil.copytree(BASE, other)
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")
    randomize(unet, 3).save_pretrained(other / "unet")
    with pytest.raises(ExportError, match=r"base: .* is not what the bundle was exported from: .*norm.* differs"):
        replace_loras(demo, [Lora(str(style))], str(other), MOTION)
    with pytest.raises(ExportError, match="base: the bundle does not hold where 'base' lies; give it with --base"):
        replace_loras(demo, [])
    with pytest.raises(ExportError, match=r": with its LoRAs, .* has values that are NaN or infinite"):
        replace_loras(demo, [Lora(str(style), 1e39)], BASE, MOTION)
    with pytest.raises(BundleError, match="is not a folder"):
        replace_loras(tmp_path / "nothing", [], BASE, MOTION)
    with pytest.raises(ExportError, match="output: .* exists and is not an empty folder"):
        replace_loras(demo, [], BASE, MOTION, output=tmp_path)
    assert contents(demo) == before


def test_a_dry_run_checks_and_writes_nothing(demo: Path, style: Path, tmp_path: Path) -> None:
    before = contents(demo)
    _, lines = replace_loras(demo, [Lora(str(style))], BASE, MOTION, dry_run=True)
    assert [line.partition(":")[0] for line in lines] == [
        "onnx/text_encoder.weights",
        *read_manifest(demo).graphs["unet"].weights,
    ]
    _, lines = replace_controlnets(demo, {"rgb": str(TRAINED / "rgb")}, output=tmp_path / "new", dry_run=True)
    assert len(lines) == 1
    replace_motion_module(MOTION, demo, dry_run=True)
    assert contents(demo) == before
    assert not (tmp_path / "new").exists()


def test_a_bundle_that_changes_meanwhile_is_left_alone(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsectrl_lcm.export import motion_module

    load = motion_module.load_motion_adapter

    def other_command(source: str) -> object:
        manifest = read_manifest(demo)
        manifest.model_copy(update={"sources": {"base": "another"}}).write(demo)
        return load(source)

    monkeypatch.setattr(motion_module, "load_motion_adapter", other_command)
    with pytest.raises(ExportError, match="was changed meanwhile; run the command again"):
        replace_motion_module(MOTION, demo)
    assert read_manifest(demo).sources == {"base": "another"}


def test_a_copy_of_a_bundle_that_changes_meanwhile_is_not_written(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files would be those of two bundles."""
    from sparsectrl_lcm.export import swap

    copy = swap._copy_others

    def copy_slowly(folder: Path, manifest: Manifest, staged: Path) -> None:
        copy(folder, manifest, staged)
        manifest.model_copy(update={"sources": {"base": "another"}}).write(folder)

    monkeypatch.setattr(swap, "_copy_others", copy_slowly)
    with pytest.raises(ExportError, match="was changed meanwhile; run the command again"):
        replace_motion_module(MOTION, demo, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_links_into_a_hub_cache_are_left_alone(demo: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "1"
    blob.parent.mkdir()
    (demo / "tokenizer.json").rename(blob)
    (demo / "tokenizer.json").symlink_to(blob)
    with pytest.raises(ExportError, match="bundle: the files of .* are links, as in a hub's cache; give -o"):
        replace_motion_module(MOTION, demo)
    replace_motion_module(MOTION, demo, output=tmp_path / "new")
    assert not (Bundle.load(tmp_path / "new").folder / "tokenizer.json").is_symlink()


def test_a_graph_of_its_own_is_checked_before_the_bundle_changes(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, command = contents(demo), ["export", "motion-module", "--motion-adapter", MOTION]
    assert cli.run([*command, str(demo), "--standalone", str(tmp_path / "motion.weights")]) == 2
    assert "--standalone: " in capsys.readouterr().err
    assert cli.run([*command, str(demo), "--standalone", "motion.onnx", "--temporal-norm", "resnet-clip"]) == 2
    assert "resnet-clip" in capsys.readouterr().err
    assert cli.run([*command, "--standalone", "motion.onnx", "-o", str(tmp_path / "new")]) == 2
    assert "there is no BUNDLE to write" in capsys.readouterr().err
    assert cli.run([*command, "--standalone", str(tmp_path / "motion.onnx"), "--dry-run"]) == 0
    assert "would write " in capsys.readouterr().out
    assert cli.run(["export", "motion-module", "--motion-adapter", "./x", "--standalone", "x.onnx", "--dry-run"]) == 2
    assert contents(demo) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


def test_the_commands_say_what_they_did(demo: Path, style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And they build the engines of ONNX Runtime again if the bundle has some."""
    arguments = ["export", "lora", str(demo), "--lora", f"{style}=0.5", "--base", BASE, "--motion-adapter", MOTION]
    assert cli.run([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "lora_0: style.safetensors=0.5, was none" in said
    assert "would replace onnx/unet.motion.weights: " in said
    assert cli.run(["build", str(demo), "--backend", "onnxruntime"]) == 0
    capsys.readouterr()
    assert cli.run(["export", "controlnet", str(demo), "--rgb", str(TRAINED / "rgb")]) == 0
    said = capsys.readouterr().out
    assert "replaced onnx/controlnet_rgb.weights: " in said
    assert "onnxruntime fp32: " in said
    assert cli.run(["export", "controlnet", str(demo)]) == 2
    assert "nothing to replace; give --scribble, --rgb or both" in capsys.readouterr().err
    assert json.loads((demo / "manifest.json").read_text())["sources"]["base"] == "base"
    clip = VideoPipeline.load(demo, "onnxruntime").generate("a star", num_frames=1, num_inference_steps=1, seed=1)
    assert np.isfinite(clip.frames).all()
