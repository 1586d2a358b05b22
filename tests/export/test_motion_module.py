"""Replacing a bundle's motion modules: which adapters fit, which are refused, and bundles stay whole on errors."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from architectures import ARCHITECTURES
from closeness import assert_close
from conftest import ROOT, Exported
from diffusers import MotionAdapter
from references import animatediff_pipeline, to_uint8
from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, randomize, write_motion_adapter
from sparsectrl_lcm.export import swap
from sparsectrl_lcm.export.check import ExportError
from sparsectrl_lcm.export.motion_module import export_standalone, replace_motion_module
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.temporary_folders import staged_folder

WEIGHTS = "onnx/unet.motion.weights"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the package's demo bundle: three levels, attention with four heads."""
    return Path(shutil.copytree(ROOT / "runtime" / "demo_bundle", tmp_path / "demo"))


def write_adapter(folder: Path, heads: int | tuple[int, ...]) -> str:
    """Writes random motion modules with the shapes of the demo bundle's."""
    adapter = MotionAdapter(
        block_out_channels=(32, 48, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=heads,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
    )
    randomize(adapter, seed=5).save_pretrained(folder)
    return str(folder)


def contents(bundle: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def leave_behind(output: Path) -> None:
    """Leaves the temporary folder of an export to `output` that is killed while it writes."""

    def write() -> None:
        with staged_folder(output.parent, output.name) as folder:
            (folder / output.name).write_bytes(bytes(1000))
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert list(output.parent.glob(f".*/{output.name}"))


def test_another_motion_module_replaces_one_file(sd15_like: Exported, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(sd15_like.bundle, tmp_path / "bundle"))
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    adapter = write_motion_adapter(tmp_path / "adapter", ARCHITECTURES["sd15_like"], seed=99)
    replace_motion_module(str(adapter), bundle)
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"manifest.json", "unet.motion.weights"}
    sources = Bundle.load(sd15_like.bundle).manifest.sources
    assert Bundle.load(bundle).manifest.sources == sources | {"motion_adapter": "adapter"}
    assert {path for path in bundle.rglob("*") if path.is_file()} == before.keys()

    reference = animatediff_pipeline(sd15_like.checkpoints)
    reference.unet.load_motion_modules(MotionAdapter.from_pretrained(adapter))
    expected = reference(
        "a boat",
        num_inference_steps=2,
        guidance_scale=1.0,
        num_frames=4,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="np",
    ).frames[0]
    clip = VideoPipeline.load(bundle, "onnxruntime").generate("a boat", num_inference_steps=2, num_frames=4, seed=1)
    assert_close(clip.frames, to_uint8(expected))

    replace_motion_module(str(sd15_like.checkpoints / "motion_adapter"), bundle)
    for path, content in before.items():
        assert path.name == "manifest.json" or path.read_bytes() == content


def test_a_motion_module_that_does_not_fit_is_refused(sd15_like: Exported, tmp_path: Path) -> None:
    narrow = write_motion_adapter(tmp_path / "narrow", Architecture(channels=(16, 32, 32, 32)), seed=1)
    deep = write_motion_adapter(tmp_path / "deep", Architecture(layers=2), seed=1)
    for source in (narrow, deep):
        with pytest.raises(ExportError, match="export the bundle again"):
            replace_motion_module(str(source), sd15_like.bundle)


@pytest.mark.slow
def test_the_motion_module_as_a_graph_of_its_own(tmp_path: Path) -> None:
    """Compares layer by layer with diffusers' own temporal transformers."""
    arch = Architecture(channels=(16,), groups=8)
    source = write_motion_adapter(tmp_path / "adapter", arch, seed=4)
    with pytest.raises(ExportError, match=r"give a name that ends in \.onnx"):
        export_standalone(str(source), "clip", tmp_path / "motion.weights")
    path = tmp_path / "new" / "motion.onnx"
    leave_behind(path)
    assert export_standalone(str(source), "clip", path) <= 1e-4
    adapter = MotionAdapter.from_pretrained(source)
    assert sorted(file.name for file in path.parent.iterdir()) == ["motion.onnx", "motion.weights"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    states = {item.name: torch.randn(6, item.shape[1], 4, 3, generator=generator) for item in session.get_inputs()}
    outputs = session.run(None, {name: state.numpy() for name, state in states.items()})
    names = [item.name for item in session.get_outputs()]
    assert len(names) == sum(name.endswith("proj_in.weight") for name in adapter.state_dict())
    for name, output in zip(names, outputs, strict=True):
        block = adapter.get_submodule(name.removesuffix(".output"))
        with torch.no_grad():
            expected = block(states[name.replace(".output", ".input")], num_frames=6)
        assert np.abs(output - expected.numpy()).max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (2, r"down_blocks\.0\..*attn1 has 2 attention heads, in the bundle 4; export the bundle again"),
        (8, r"down_blocks\.0\..*attn1 has 8 attention heads, in the bundle 4"),
        ((4, 4, 2), r"down_blocks\.2\..*attn1 has 2 attention heads, in the bundle 4"),
    ],
)
def test_other_attention_heads_are_refused(
    heads: int | tuple[int, ...], message: str, demo: Path, tmp_path: Path
) -> None:
    before = contents(demo)
    with pytest.raises(ExportError, match=message) as error:
        replace_motion_module(write_adapter(tmp_path / "adapter", heads), demo)
    assert "\n" not in str(error.value)
    assert contents(demo) == before


def test_heads_are_read_in_every_bundle(exported: Exported, tmp_path: Path) -> None:
    """With and without a middle block, with four and three heads, and with clip statistics.

    The demo bundle covers frame statistics.
    """
    bundle = Path(shutil.copytree(exported.bundle, tmp_path / "bundle"))
    before = contents(bundle)
    adapter = Path(shutil.copytree(exported.checkpoints / "motion_adapter", tmp_path / "motion_adapter"))
    replace_motion_module(str(adapter), bundle)
    assert contents(bundle) == before
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps({**config, "motion_num_attention_heads": 2}))
    with pytest.raises(ExportError, match="has 2 attention heads"):
        replace_motion_module(str(adapter), bundle)


@pytest.mark.parametrize("heads", [4, (4, 4, 4)])
def test_the_same_attention_heads_are_taken(heads: int | tuple[int, ...], demo: Path, tmp_path: Path) -> None:
    before = contents(demo)
    replace_motion_module(write_adapter(tmp_path / "adapter", heads), demo)
    Bundle.load(demo)
    assert {path.relative_to(demo).as_posix() for path, data in contents(demo).items() if data != before[path]} == {
        "manifest.json",
        WEIGHTS,
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("file", [WEIGHTS, "manifest.json.part"])
def test_a_full_disk_leaves_the_bundle_as_it_was(
    file: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full_disk(parent: Path, name: str) -> Iterator[Path]:
        with staged_folder(parent, name) as folder:
            (folder / "onnx").mkdir()
            (folder / file).symlink_to("/dev/full")
            yield folder

    monkeypatch.setattr(swap, "staged_folder", full_disk)
    before = contents(demo)
    with pytest.raises(ExportError, match="bundle: .* cannot be written: No space left on device"):
        replace_motion_module(write_adapter(tmp_path / "adapter", 4), demo)
    assert contents(demo) == before
    assert not list(demo.glob(".*"))
    Bundle.load(demo)
