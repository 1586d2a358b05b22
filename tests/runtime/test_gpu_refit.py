"""Engines on the emulated device get other weights, or say why they cannot."""

import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Exported
from fakes.emulated_demo import emulated_demo, keyframes
from sparsectrl_lcm.runtime import BackendError, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.weights import WeightTable


@pytest.fixture
def demo() -> SimpleNamespace:
    """The demo bundle on an emulated device, whose engines return digests of their inputs."""
    return emulated_demo()


def test_refit_gives_the_engines_other_weights_and_the_base_back(demo: SimpleNamespace, tmp_path: Any) -> None:
    from bundles import with_other_motion_module

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    name = "down_blocks.0.motion_modules.0.proj_in.weight"
    demo.loader.tables["unet"] = table = weight_table(demo.bundle, "unet")
    demo.pipeline.generate("a boat", keyframes(), seed=1)
    demo.pipeline.refit(other)
    assert demo.cudart.graphs == {}, "graphs are captured again"
    graph, weights = demo.loader.refitted.pop()
    assert graph == "unet"
    assert set(weights) == {name for name, record in table.root.items() if "motion" in record.path}
    assert (weights[name] == table.read(Bundle.load(other), name)).all()
    assert (weights[name] != table.read(demo.bundle, name)).any()
    demo.loader.enqueued.clear()
    demo.pipeline.generate("a boat", keyframes(), seed=1)
    assert "controlnet_scribble" in demo.loader.enqueued, "no result of the old weights is kept"

    demo.pipeline.refit(None)
    _, weights = demo.loader.refitted.pop()
    assert all((weights[name] == table.read(demo.bundle, name)).all() for name in weights)
    demo.pipeline.refit(None)
    assert demo.loader.refitted == []


def test_refit_needs_the_same_architecture(demo: SimpleNamespace, sd15_like: Exported) -> None:
    demo.loader.tables["unet"] = weight_table(demo.bundle, "unet")
    demo.pipeline.generate("a boat", seed=1)
    with pytest.raises(BackendError, match="is not the same graph .* same architecture"):
        demo.pipeline.refit(sd15_like.bundle)


@pytest.mark.parametrize("what", ["schedule", "tokenizer"])
def test_refit_needs_the_same_schedule_and_tokenizer(what: str, demo: SimpleNamespace, tmp_path: Path) -> None:
    """AnimateLCM's motion module has a schedule of its own, a textual inversion words of its own."""
    from bundles import with_other_motion_module

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    if what == "schedule":
        manifest["scheduler"]["original_inference_steps"] = 100
    else:
        changed = (other / "tokenizer.json").read_bytes() + b" "
        (other / "tokenizer.json").write_bytes(changed)
        manifest["files"]["tokenizer.json"] = {"sha256": sha256(changed).hexdigest(), "bytes": len(changed)}
    (other / "manifest.json").write_text(json.dumps(manifest))
    demo.loader.tables["unet"] = weight_table(demo.bundle, "unet")
    with pytest.raises(BackendError, match=f"has another {what}; load that bundle instead"):
        demo.pipeline.refit(other)


def test_refit_refuses_weights_that_changed_since_their_bundle_was_loaded(
    demo: SimpleNamespace, tmp_path: Path
) -> None:
    from bundles import with_other_motion_module

    other = Bundle.load(with_other_motion_module(demo.bundle.folder, tmp_path / "other"))
    demo.loader.tables["unet"] = weight_table(demo.bundle, "unet")
    demo.pipeline.generate("a boat", seed=1)
    weights = other.folder / "onnx/unet.motion.weights"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    with pytest.raises(BackendError, match=r"^refit: 'onnx/unet.motion.weights' in .* since the bundle was loaded"):
        demo.executor.refit(other)
    assert demo.loader.refitted == []
    assert demo.executor.weights is demo.bundle


def test_a_refit_that_fails_leaves_the_old_weights(demo: SimpleNamespace, tmp_path: Path) -> None:
    """The refit fails half-way, or when engines are loaded later."""
    from bundles import with_other_motion_module

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    before = demo.pipeline.generate("a boat", seed=1).frames
    with pytest.raises(BackendError, match="was built without refit; build it again with refit"):
        demo.pipeline.refit(other)
    assert demo.executor.weights is demo.bundle
    assert (demo.pipeline.generate("a boat", seed=1).frames == before).all()

    demo.pipeline.close()
    with pytest.raises(BackendError, match="was built without refit"):  # also if no engine is open
        demo.pipeline.refit(other)
    demo.executor.refit(Bundle.load(other))  # as if only engines of another size could be refitted
    for _ in range(2):
        with pytest.raises(BackendError, match="was built without refit"):
            demo.pipeline.generate("a boat", seed=1)
    demo.pipeline.refit(None)
    assert (demo.pipeline.generate("a boat", seed=1).frames == before).all()


def test_a_backend_that_can_never_refit_says_so_at_once(
    demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bundles import with_other_motion_module
    from sparsectrl_lcm.runtime.gpu.onnxruntime import OnnxRuntimeCudaLoader

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    monkeypatch.setattr(demo.loader, "check_refit", OnnxRuntimeCudaLoader().check_refit)
    with pytest.raises(BackendError, match="ONNX Runtime"):
        demo.pipeline.refit(other)
    assert demo.executor.weights is demo.bundle
    demo.pipeline.refit(None)


def test_the_cpu_backend_cannot_refit() -> None:
    with pytest.raises(BackendError, match="load the other bundle instead"):
        VideoPipeline.load(backend="onnxruntime").refit(None)


def weight_table(bundle: Bundle, graph: str) -> WeightTable:
    from sparsectrl_lcm.engine.rewrites import typed_graph as typed

    return typed.weight_table(bundle, graph, typed.typed_graph(bundle, graph, "fp16"))
