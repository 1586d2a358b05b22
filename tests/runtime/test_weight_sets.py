"""Requests name the weights that they are made with."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from bundles import with_other_motion_module, with_other_weights
from fakes.emulated_demo import SMALL, emulated_demo, keyframes, small_clip
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph, weight_table
from sparsectrl_lcm.runtime import BackendError, BundleError, ClipRequest, InvalidRequest, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.workspace import Workspace


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with another motion module."""
    return with_other_motion_module(demo_bundle(), tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def table() -> WeightTable:
    bundle = Bundle.load()
    return weight_table(bundle, "unet", typed_graph(bundle, "unet", "fp16"))


@pytest.fixture
def demo(other: Path, table: WeightTable) -> SimpleNamespace:
    """A pipeline on an emulated device with other weights; the loader notes what its UNet gets."""
    machine = emulated_demo(SMALL)
    machine.loader.tables["unet"] = table
    machine.pipeline = VideoPipeline(machine.bundle, machine.executor, {"other": other})
    return machine


def refits(machine: SimpleNamespace) -> int:
    """Refits of the engines since the last call."""
    count = len(machine.loader.refitted)
    machine.loader.refitted.clear()
    return count


def test_engines_are_refitted_only_for_a_request_with_other_weights(demo: SimpleNamespace) -> None:
    def ask(name: str | None) -> tuple[int, bool, str]:
        clip = small_clip(demo, "a boat", keyframes(), seed=1, num_inference_steps=1, weights=name)
        assert clip.timings.get("refit", 0) < clip.timings["total"]
        return refits(demo), "refit" in clip.timings, clip.metadata["bundle"]

    assert list(demo.pipeline.weights) == ["other"]
    assert [ask(name) for name in (None, "other", "other", None, None)] == [
        (0, False, "demo_bundle"),
        (1, True, "other"),
        (0, False, "other"),
        (1, True, "demo_bundle"),
        (0, False, "demo_bundle"),
    ]


def test_requests_of_one_call_have_their_own_weights(demo: SimpleNamespace) -> None:
    names = (None, "other", "other", None)
    size = {"width": SMALL.width, "height": SMALL.height, "num_frames": SMALL.frames}
    requests = [ClipRequest("a", weights=name, **size) for name in names]
    clips = [result.get() for result in demo.pipeline.generate_many(requests)]
    assert [clip.metadata["bundle"] for clip in clips] == ["demo_bundle", "other", "other", "demo_bundle"]
    assert refits(demo) == 2


def test_the_engine_has_all_weights_of_the_bundle_that_a_request_names(
    demo: SimpleNamespace, table: WeightTable, other: Path, tmp_path: Path
) -> None:
    """Those of `other` differ in the motion module, those of `third` in the other weights of the UNet."""
    third = with_other_weights(demo_bundle(), tmp_path / "third", "onnx/unet.weights")
    bundles = {"demo_bundle": demo.bundle, "other": Bundle.load(other), "third": Bundle.load(third)}
    expected = {made: {name: table.read(bundle, name) for name in table.root} for made, bundle in bundles.items()}
    held = dict(expected["demo_bundle"])
    demo.pipeline = VideoPipeline(demo.bundle, demo.executor, {"other": other, "third": third})

    def ask(name: str | None) -> str:
        made: str = small_clip(demo, "a", num_inference_steps=1, weights=name).metadata["bundle"]
        for _, weights in demo.loader.refitted:
            held.update(weights)
        demo.loader.refitted.clear()
        assert all((values == expected[made][weight]).all() for weight, values in held.items())
        return made

    assert [ask(name) for name in (None, "other", "third", None)] == ["demo_bundle", "other", "third", "demo_bundle"]
    demo.pipeline.refit(third)  # requests that name none have these from now on
    assert [ask(name) for name in (None, "other", None)] == ["third", "other", "third"]
    demo.pipeline.refit(None)
    assert ask(None) == "demo_bundle"


def test_weights_that_cannot_be_fitted_fail_their_request_alone(
    demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(name: str | None) -> np.ndarray:
        return small_clip(demo, "a boat", keyframes(), seed=1, weights=name).frames

    own = ask(None)
    failing = BackendError("refit", "the engine has no weight 'x'", "build it again")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "refit", Mock(side_effect=failing))
        with pytest.raises(BackendError, match=r"^refit: the weights of 'other' cannot be used: .*; build it again$"):
            ask("other")
    assert demo.executor.weights is demo.bundle
    np.testing.assert_array_equal(ask(None), own)
    ask("other")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "refit", Mock(side_effect=[failing, *[None] * 20]))
        np.testing.assert_array_equal(ask(None), own)
    assert demo.executor.weights is demo.bundle
    assert caplog.messages[-1] == "the engines are loaded again with their own weights: the engine has no weight 'x'"


def test_a_refit_that_is_refused_changes_nothing(demo: SimpleNamespace, tmp_path: Path) -> None:
    """Also if the engines have the weights that the request before it named."""
    wrong = with_other_motion_module(demo_bundle(), tmp_path / "wrong")
    manifest = json.loads((wrong / "manifest.json").read_text())
    manifest["scheduler"]["original_inference_steps"] = 100
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    small_clip(demo, "a", num_inference_steps=1, weights="other")
    with pytest.raises(BackendError, match="has another schedule"):
        demo.pipeline.refit(wrong)
    small_clip(demo, "a", num_inference_steps=1)
    assert demo.executor.weights is demo.bundle


def test_an_unknown_name_is_refused(demo: SimpleNamespace) -> None:
    with pytest.raises(InvalidRequest, match=r"^weights: 'x' is not allowed; allowed are other$"):
        demo.pipeline.generate("a", weights="x")
    demo.pipeline.check(ClipRequest("a", weights="other"))
    plain = VideoPipeline(demo.bundle, demo.executor)
    with pytest.raises(
        InvalidRequest, match="'other' is not allowed; leave it out, as this pipeline was loaded with no"
    ):
        plain.generate("a", weights="other")
    with pytest.raises(InvalidRequest, match=r'^weights: list is not allowed; give bundles by name, such as {"anime"'):
        VideoPipeline(demo.bundle, demo.executor, ["other"])  # type: ignore[arg-type]


def test_weights_that_no_request_could_have_are_refused_at_once(demo: SimpleNamespace, other: Path) -> None:
    with pytest.raises(
        BackendError, match=r"^weights: b: onnxruntime cannot change the weights of its engines; load the"
    ):
        VideoPipeline.load(backend="onnxruntime", weights={"b": other})
    demo.loader.tables.clear()
    with pytest.raises(BackendError, match=r"^weights: b: the engine of 'unet' was built without refit; build it"):
        VideoPipeline(demo.bundle, demo.executor, {"b": other})
    with pytest.raises(BundleError, match="none"):
        VideoPipeline(demo.bundle, demo.executor, {"b": other / "none"})
