"""Bundles as they lie in a hub's cache: files are links to files with other names outside of the folder."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from sparsectrl_lcm.engine.build import build
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph, write_typed
from sparsectrl_lcm.runtime import BundleError, VideoPipeline
from sparsectrl_lcm.runtime.cpu.onnxruntime import OnnxRuntimeSessions
from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSessions
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.linked_files import without_links


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The demo bundle's portable files, laid out as huggingface_hub does."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    source = demo_bundle()
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and "engines" not in name.parts:
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except OSError:
                pytest.skip("links cannot be made here")
    return snapshot


def test_such_a_bundle_makes_clips(snapshot: Path) -> None:
    request = {"num_inference_steps": 1, "num_frames": 1, "seed": 1, "height": 64, "width": 64}
    loaded = (VideoPipeline.load(snapshot, "onnxruntime"), VideoPipeline.load(backend="onnxruntime"))
    clips = [pipeline.generate("a red star", **request) for pipeline in loaded]
    assert abs(clips[0].frames.astype(int) - clips[1].frames).max() <= 1


def test_openvino_takes_such_a_bundle(snapshot: Path) -> None:
    """It reads every graph with its files of weights, and computes as without links."""
    core = pytest.importorskip("openvino").Core()
    linked, plain = Bundle.load(snapshot), Bundle.load()
    for record in linked.manifest.graphs.values():
        assert core.read_model(linked.folder / record.path).inputs
    latents = {"latents": np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)}
    frames = []
    for sessions in (OpenVinoSessions(linked), OnnxRuntimeSessions(plain)):
        sessions.open("vae_decoder", {"images": 1, "latent_height": 8, "latent_width": 8})
        frames.append(sessions.session("vae_decoder").run(latents)[0])
    assert abs(frames[0].astype(int) - frames[1]).max() <= 1


def test_engines_can_be_built(snapshot: Path) -> None:
    build(snapshot, "onnxruntime", BuildOptions())
    again = Bundle.load(snapshot)
    assert (again.folder / "engines" / "onnxruntime").is_dir()
    assert not (snapshot / "engines").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_typed_graphs_have_the_same_weights(precision: str, snapshot: Path, tmp_path: Path) -> None:
    """Those of OpenVINO, TensorRT and ONNX Runtime on CUDA; onnx-ir itself refuses to read hard links."""
    for name, bundle in (("linked", Bundle.load(snapshot)), ("plain", Bundle.load())):
        (tmp_path / name).mkdir()
        write_typed(typed_graph(bundle, "vae_encoder", precision), tmp_path / name / "vae_encoder.onnx")
    linked, plain = (tmp_path / name / "vae_encoder.weights" for name in ("linked", "plain"))
    assert plain.stat().st_size > 1024
    assert linked.read_bytes() == plain.read_bytes()


def test_links_take_no_space_and_follow_changes(snapshot: Path) -> None:
    folder = without_links(snapshot)
    assert folder != snapshot
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    weights = "onnx/unet.weights"
    assert (folder / weights).samefile(snapshot / weights)
    assert without_links(snapshot) == folder
    assert without_links(folder) == folder
    manifest = snapshot / "manifest.json"
    changed = manifest.read_text() + "\n"
    manifest.unlink()
    manifest.write_text(changed)
    assert (without_links(snapshot) / "manifest.json").read_text() == changed


def test_links_inside_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert without_links(tmp_path) == tmp_path


def test_a_broken_link_is_told(snapshot: Path) -> None:
    path = snapshot / "onnx" / "unet.weights"
    path.resolve().unlink()
    with pytest.raises(BundleError, match="onnx/unet.weights"):
        Bundle.load(snapshot)
