"""ONNX Runtime engines: they give the same frames, and stale or damaged ones are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from closeness import assert_close
from conftest import Exported
from pictures import pictures
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.check import random_inputs, run_portable
from sparsectrl_lcm.engine.comparison import measure
from sparsectrl_lcm.engine.onnxruntime import fuse_spatial_attention
from sparsectrl_lcm.engine.rewrites.attention import is_spatial_self_attention
from sparsectrl_lcm.runtime import BackendError, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.engine_sets import engine_folders, find_set

UNCHECKED = BuildOptions(check=False)


@pytest.fixture(scope="module")
def built(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines, which are only read."""
    bundle = Path(shutil.copytree(exported.bundle, tmp_path_factory.mktemp("exported") / "bundle"))
    build(bundle, "onnxruntime")
    return bundle


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def test_every_spatial_self_attention_is_fused(built: Path) -> None:
    folder = built / "engines" / "onnxruntime" / "fp32"
    for graph in ("unet", "controlnet_scribble", "controlnet_rgb"):
        before, after = operators(built / f"onnx/{graph}.onnx"), operators(folder / f"{graph}.onnx")
        spatial = {
            node.name.split(".attn1")[0]
            for node in onnx.load(built / f"onnx/{graph}.onnx", load_external_data=False).graph.node
            if ".attentions." in node.name and ".attn1/" in node.name
        }
        assert after.count("MultiHeadAttention") == len(spatial) > 0
        assert after.count("Softmax") == before.count("Softmax") - len(spatial)
    assert not list(folder.glob("*.weights")), "engines share the bundle's weights"


def test_an_attention_keeps_its_scale(tmp_path: Path) -> None:
    """The scale may differ from ONNX Runtime's default, 1 / sqrt(head size)."""
    bundle = Bundle.load()
    folder = Path(shutil.copytree(bundle.folder / "onnx", tmp_path / "onnx"))
    path = folder / "unet.onnx"
    model = ir.load(path)
    softmax = next(node for node in model.graph if node.op_type == "Softmax" and is_spatial_self_attention(node.name))
    for scaled in (value.producer() for value in softmax.inputs[0].producer().inputs):
        constant = scaled.inputs[1].producer().inputs[0]
        four_times = ir.Value(name="four_times", const_value=ir.tensor(np.float32(4) * constant.const_value.numpy()))
        four_times.const_value.name = "four_times"
        model.graph.initializers["four_times"] = four_times
        constant.replace_all_uses_with(four_times)
    ir.save(model, folder / "changed.onnx")
    assert fuse_spatial_attention(model)
    ir.save(model, folder / "fused.onnx")
    feeds = random_inputs(bundle, "unet")
    ((expected,), (other,), (actual,)) = (
        run_portable(folder / name, feeds) for name in ("changed.onnx", "unet.onnx", "fused.onnx")
    )
    for name, values in expected.items():
        assert measure(other[name], values).largest > 1e-3
        assert measure(actual[name], values).largest < 1e-5


@pytest.mark.parametrize(("guidance", "size"), [(1, {}), (2, {"width": 104, "height": 72})])
def test_frames_of_engines_are_those_of_the_portable_graphs(
    exported: Exported, built: Path, guidance: int, size: dict[str, int]
) -> None:
    """Also at a size that no downsampler halves without rest."""
    side = Bundle.load(built).manifest.sizes.height
    keyframes = [Keyframe(index, image) for index, image in zip((2, 5), pictures(2, side, side), strict=True)]
    request = {"guidance_scale": guidance, "seed": 3, "num_frames": 8, "num_inference_steps": 2, **size}
    clips = [
        VideoPipeline.load(bundle, "onnxruntime").generate("a red circle", keyframes, **request)
        for bundle in (exported.bundle, built)
    ]
    assert_close(clips[0].frames, clips[1].frames)


@pytest.fixture(scope="module")
def built_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path_factory.mktemp("demo") / "bundle"))
    build(bundle, "onnxruntime", UNCHECKED)
    return bundle


@pytest.fixture
def demo(built_demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle with engines, which a test may change."""
    return Path(shutil.copytree(built_demo, tmp_path / "bundle"))


def ask(bundle: Path) -> None:
    pipeline = VideoPipeline.load(bundle, "onnxruntime")
    pipeline.generate("a boat", num_frames=1, num_inference_steps=1, width=32, height=32)


def refused(bundle: Path, reason: str) -> None:
    with pytest.raises(BackendError, match=reason) as error:
        ask(bundle)
    assert f"run: sparsectrl-lcm build {bundle} --backend onnxruntime" in str(error.value)
    assert "\n" not in str(error.value)
    assert run(["build", str(bundle), "--backend", "onnxruntime", "--no-check"]) == 0
    ask(bundle)


def test_an_engine_of_another_version_is_refused(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "0.9")
    refusal = r"was built by version 1\..*, this machine has 0\.9; run: sparsectrl-lcm build"
    with pytest.raises(BackendError, match=refusal):
        ask(demo)


def test_a_damaged_engine_is_refused(demo: Path) -> None:
    engine = demo / "engines/onnxruntime/fp32/unet.onnx"
    engine.write_bytes(engine.read_bytes()[:-1])
    refused(demo, "'unet' differs from its checksum")
    engine.unlink()
    refused(demo, "'unet' is missing")


def test_an_engine_of_other_weights_is_refused(demo: Path) -> None:
    manifest = json.loads((demo / "manifest.json").read_text())
    weights = demo / "onnx/unet.motion.weights"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    import hashlib

    manifest["files"]["onnx/unet.motion.weights"]["sha256"] = hashlib.sha256(content).hexdigest()
    (demo / "manifest.json").write_text(json.dumps(manifest))
    refused(demo, "was built from another bundle")


def test_a_damaged_index_is_refused(demo: Path) -> None:
    (demo / "engines/onnxruntime/fp32/engines.json").write_text("[")
    refused(demo, "cannot be read")


def test_engines_of_a_read_only_bundle_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    (bundle / "engines").write_text("")  # a file in the place of the folder
    build(bundle, "onnxruntime", UNCHECKED)
    outside = engine_folders(bundle, "onnxruntime")[1] / "fp32"
    assert (outside / "unet.onnx").exists()
    ask(bundle)
    engines = find_set(bundle, "onnxruntime", "fp32")
    assert engines is not None
    assert engines.folder == outside


def test_an_unknown_backend_cannot_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(demo_bundle()), "--backend", "magic"]) == 2
    assert "allowed are tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino, onnxruntime" in capsys.readouterr().err
