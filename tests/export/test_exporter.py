"""The exported bundle: names, operators, layout and checks."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Exported
from diffusers import AutoencoderKL, AutoencoderTiny, MotionAdapter, SparseControlNetModel, UNet2DConditionModel
from onnx import numpy_helper
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, randomize, write_controlnet, write_motion_adapter
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.export import exporter
from sparsectrl_lcm.export import traced_modules as graphs
from sparsectrl_lcm.export.check import ExportError, check, largest_error, open_session
from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.lora import Lora
from sparsectrl_lcm.export.plan import ExportOptions
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from transformers import CLIPTextModel

GRAPHS = {
    *("text_encoder", "controlnet_scribble", "controlnet_rgb"),
    *("unet", "vae_encoder", "vae_decoder", "vae_decoder_tiny"),
}


def load(exported: Exported, graph: str, data: bool = True) -> onnx.ModelProto:
    return onnx.load(exported.bundle / f"onnx/{graph}.onnx", load_external_data=data)


def checkpoint(exported: Exported, graph: str) -> dict[str, torch.Tensor]:
    """Reads the weights that a graph should hold from the checkpoints."""
    root, base = exported.checkpoints, exported.checkpoints / "base"
    match graph:
        case "text_encoder":
            return CLIPTextModel.from_pretrained(base / "text_encoder").state_dict()
        case "unet":
            adapter = MotionAdapter.from_pretrained(root / "motion_adapter").state_dict()
            return {**UNet2DConditionModel.from_pretrained(base / "unet").state_dict(), **adapter}
        case "controlnet_scribble" | "controlnet_rgb":
            weights = SparseControlNetModel.from_pretrained(root / graph.removeprefix("controlnet_")).state_dict()
            del weights["conv_in.weight"]  # its input is always zero
            return weights
        case "vae_decoder_tiny":
            weights = AutoencoderTiny.from_pretrained(root / "tiny_decoder").state_dict()
            return {name: value for name, value in weights.items() if name.startswith("decoder.")}
    vae = AutoencoderKL.from_pretrained(base / "vae").state_dict()
    part = ("encoder.", "quant_conv.") if graph == "vae_encoder" else ("decoder.", "post_quant_conv.")
    return {name: value for name, value in vae.items() if name.startswith(part)}


def test_graphs_and_errors(exported: Exported) -> None:
    manifest = read_manifest(exported.bundle)
    assert manifest.graphs.keys() == GRAPHS | {"lcm_update"}
    for name, graph in manifest.graphs.items():
        assert 0 <= graph.max_error <= (1 if name.startswith("vae_decoder") else 1e-4)


@pytest.mark.parametrize("graph", sorted(GRAPHS | {"lcm_update"}))
def test_only_standard_operators_at_opset_21(exported: Exported, graph: str) -> None:
    path = exported.bundle / f"onnx/{graph}.onnx"
    onnx.checker.check_model(path)
    model = load(exported, graph, data=False)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert model.ir_version <= 13
    assert not model.functions


@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_every_weight_has_its_checkpoint_name(exported: Exported, graph: str) -> None:
    weights = checkpoint(exported, graph)
    initializers = {item.name: item for item in load(exported, graph).graph.initializer}
    assert weights.keys() - initializers.keys() == set()
    nameless = [item for name, item in initializers.items() if name not in weights]
    assert max(np.prod(item.dims, dtype=int) for item in nameless) <= 77 * 77, "every weight has a name"
    for name, weight in weights.items():
        transposed = {item.key: item.value for item in initializers[name].metadata_props}.get("transposed")
        values = numpy_helper.to_array(initializers[name])
        assert (values == (weight.T if transposed else weight).numpy()).all(), name


def test_motion_module_weights_lie_in_a_file_of_their_own(exported: Exported) -> None:
    adapter = MotionAdapter.from_pretrained(exported.checkpoints / "motion_adapter").state_dict()
    files: dict[str, set[str]] = {}
    for item in load(exported, "unet", data=False).graph.initializer:
        for entry in item.external_data:
            if entry.key == "location":
                files.setdefault(entry.value, set()).add(item.name)
    assert files.keys() == {"unet.weights", "unet.motion.weights"}
    assert files["unet.motion.weights"] == adapter.keys()


@pytest.mark.parametrize("graph", ["unet", "controlnet_scribble", "vae_decoder", "vae_encoder"])
def test_height_and_width_are_symbolic(exported: Exported, graph: str) -> None:
    shapes = {
        item.name: [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim]
        for item in load(exported, graph, data=False).graph.input
    }
    main = {"unet": "latents", "controlnet_scribble": "conditioning", "vae_decoder": "latents", "vae_encoder": "image"}
    symbolic = [size for size in shapes[main[graph]] if isinstance(size, str)]
    assert any("height" in size for size in symbolic)
    assert any("width" in size for size in symbolic)


def test_nodes_are_named_after_their_modules(exported: Exported) -> None:
    names = {node.name for node in load(exported, "unet", data=False).graph.node}
    assert len(names) == len(load(exported, "unet", data=False).graph.node)
    assert any(name.startswith("down_blocks.0.motion_modules.0.transformer_blocks.0.attn1/Softmax") for name in names)


@pytest.mark.parametrize("sizes", [(2, 1, 8, 8), (1, 32, 16, 8), (2, 5, 24, 32)])
def test_the_unet_graph_at_sizes_it_was_not_traced_with(sd15_like: Exported, sizes: tuple[int, ...]) -> None:
    """Compares predictions and guided steps of the graphs with diffusers' UNetMotionModel and LCMScheduler."""
    from diffusers import LCMScheduler
    from references import animatediff_pipeline
    from sparsectrl_lcm.runtime.loop.schedule import lcm_schedule

    batch, frames, height, width = sizes
    unet = animatediff_pipeline(sd15_like.checkpoints).unet
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, frames, height, width, generator=generator)
    prompt = torch.randn(batch, 77, 48, generator=generator)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    sessions = {
        name: onnxruntime.InferenceSession(sd15_like.bundle / f"onnx/{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("unet", "lcm_update")
    }
    residual_shapes = {item.name: item.shape[1] for item in sessions["unet"].get_inputs() if "residual" in item.name}
    scheduler = LCMScheduler(beta_schedule="linear")
    scheduler.set_timesteps(4)
    schedule = lcm_schedule(read_manifest(sd15_like.bundle).scheduler, 4)
    feeds = {
        "latents": latents.numpy(),
        "timestep": schedule.timesteps[:1],
        "prompt_embeds": prompt.numpy(),
        "conditioning_scale": np.ones(1, np.float32),
        **{name: np.zeros((1, channels, 1, 1), np.float32) for name, channels in residual_shapes.items()},
    }
    (prediction,) = sessions["unet"].run(None, feeds)
    with torch.no_grad():
        wanted = unet(latents.expand(batch, -1, -1, -1, -1), 999, prompt.repeat_interleave(frames, 0)).sample
    assert scheduler.timesteps[0] == 999
    update = {
        "latents": latents.numpy(),
        "negative": prediction[:1],
        "positive": prediction[-1:],
        "guidance_scale": np.array([1.7], np.float32),
        "noise": noise.numpy(),
        "coefficients": schedule.coefficients[0],
    }
    next_latents, images = sessions["lcm_update"].run(None, update)
    guided = wanted[:1] + 1.7 * (wanted[-1:] - wanted[:1])
    expected = scheduler.step(guided, 999, latents, generator=torch.Generator().manual_seed(1))
    pairs = ((prediction, wanted), (next_latents, expected.prev_sample), (images, expected.denoised[0].transpose(0, 1)))
    for actual, reference in pairs:
        assert np.abs(actual - reference.numpy()).max() <= 1e-5 * max(1.0, reference.abs().max().item())


def test_a_graph_that_differs_is_refused(sd15_like: Exported) -> None:
    """Runs the check of every export against a module with one changed weight."""
    vae = AutoencoderKL.from_pretrained(sd15_like.checkpoints / "base" / "vae").eval()
    image = torch.randint(256, (1, 16, 24, 3), dtype=torch.uint8)
    session = open_session(sd15_like.bundle / "onnx/vae_encoder.onnx")
    with torch.no_grad():
        assert largest_error(session, (image,), (graphs.VaeEncoder(vae)(image),)) <= 1e-4
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 0.5
        error = largest_error(session, (image,), (graphs.VaeEncoder(vae)(image),))
    with pytest.raises(ExportError, match="'vae_encoder' differs from torch by"):
        check("vae_encoder", error, frames=False)
    with pytest.raises(ExportError):
        check("unet", float("nan"), frames=False)


def test_bad_sources_leave_nothing_behind(sd15_like: Exported, tmp_path: Path) -> None:
    root = sd15_like.checkpoints
    good = {"base": str(root / "base"), "motion_adapter": str(root / "motion_adapter")}
    other = write_motion_adapter(tmp_path / "other", Architecture(channels=(32, 48)), seed=1)
    short = tmp_path / "short"
    MotionAdapter((32, 64), 1, motion_norm_num_groups=8, motion_max_seq_length=16).save_pretrained(short)
    thin = write_controlnet(tmp_path / "thin", Architecture(channels=(16, 32, 32, 32)), "scribble", seed=1)
    cases = [
        ({"base": str(tmp_path / "nothing")}, "^base: .* is not a folder"),
        ({"base": str(root)}, "^base: cannot load"),
        ({"motion_adapter": str(root / "base")}, "^motion_adapter: cannot load"),
        ({"motion_adapter": str(other)}, "^motion_adapter: .* does not fit the base: its channels and layers are "),
        (
            {"controlnets": {"scribble": str(thin)}},
            "^controlnet_scribble: .* does not fit the base: block_out_channels",
        ),
        ({"loras": (Lora(str(tmp_path / "no.safetensors")),)}, "^lora: cannot load"),
        ({"controlnets": {"scribble": str(root / "rgb")}}, "is a SparseCtrl for rgb; pass it as controlnet_rgb"),
        ({"controlnets": {"rgb": str(root / "scribble")}}, "is a SparseCtrl for scribble"),
        ({"vae": str(root / "rgb")}, "^vae: .* holds a SparseControlNetModel; give .* AutoencoderKL"),
        ({"frames": 33}, "^frames: 33 is out of range"),
        ({"temporal_norm": "batch"}, "choose frame, clip or resnet-clip"),
        ({"width": 100, "height": 128}, "multiples of 8"),
        ({"width": 4096, "height": 4096}, "from 8 to 2048"),
        ({"width": 0, "height": 0}, "multiples of 8"),
        ({"motion_adapter": str(short), "frames": 24}, "^frames: 24 is out of range; .* allow 1 to 16"),
        ({"scheduler": {"beta_schedule": "squaredcos_cap_v2"}}, "not supported"),
        ({"scheduler": {"beta_shedule": "linear"}}, "'beta_shedule' is not a setting of LCMScheduler"),
        ({"scheduler": {"beta_start": float("nan")}}, "not supported"),
    ]
    target = tmp_path / "target"
    for change, message in cases:
        with pytest.raises(ExportError, match=message) as error:
            export_bundle(ExportOptions(**{**good, **change}), target / "bundle")
        assert "\n" not in str(error.value)
        assert not target.exists() or not list(target.iterdir())


def test_bad_sources_are_told_by_the_command_line_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["export", "--base", "./nothing", "--motion-adapter", "./nothing", "-o", "bundle"]
    for more, message in (([], "--base: './nothing' is not a folder"), (["--lora", "x=heavy"], "--lora: 'x=heavy'")):
        assert run([*arguments, *more]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an empty folder"):
        export_bundle(ExportOptions("base", "motion"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled_in_its_place(
    sd15_like: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be a mount. A full disk gives an error of one line and leaves nothing behind."""

    def run(self: exporter._Exporter) -> str:
        (self.folder / "tokenizer.json").write_text("{}")
        (self.folder / "manifest.json").write_text("{}")
        return "made"

    root = sd15_like.checkpoints
    options = ExportOptions(str(root / "base"), str(root / "motion_adapter"))
    monkeypatch.setattr(exporter._Exporter, "run", run)
    target = tmp_path / "bundle"
    target.mkdir()
    inode = target.stat().st_ino
    assert export_bundle(options, target) == "made"
    assert target.stat().st_ino == inode
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "onnx", "tokenizer.json"]
    assert export_bundle(options, tmp_path / "a" / "new") == "made"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["new"]

    def full(self: exporter._Exporter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter._Exporter, "run", full)
    with pytest.raises(ExportError, match="output: .* cannot be written: No space left on device"):
        export_bundle(options, tmp_path / "b" / "new")
    assert not (tmp_path / "b").exists()


def test_the_manifest_names_its_sources(sd15_like: Exported) -> None:
    manifest = json.loads((sd15_like.bundle / "manifest.json").read_text())
    assert manifest["sources"] == {
        "base": "base",
        "motion_adapter": "motion_adapter",
        "controlnet_scribble": "scribble",
        "controlnet_rgb": "rgb",
        "tiny_decoder": "tiny_decoder",
    }
    assert str(sd15_like.checkpoints) not in json.dumps(manifest), "no path of this machine"


def test_random_weights_are_zero_nowhere(sd15_like: Exported) -> None:
    for kind in ("scribble", "rgb"):
        for name, weight in SparseControlNetModel.from_pretrained(sd15_like.checkpoints / kind).named_parameters():
            assert (weight != 0).all(), name
    assert all((weight != 0).all() for weight in randomize(torch.nn.Linear(50, 50), 0).parameters())


def test_a_keyframe_reaches_every_frame(sd15_like: Exported) -> None:
    pipeline = VideoPipeline.load(sd15_like.bundle, "onnxruntime")
    white, black = np.full((8, 8, 3), 255, np.uint8), np.zeros((8, 8, 3), np.uint8)
    clips = [pipeline.generate("a boat", [Keyframe(3, image)], seed=1).frames.astype(int) for image in (white, black)]
    assert (np.abs(clips[0] - clips[1]).reshape(16, -1).max(axis=1) > 3).all()
