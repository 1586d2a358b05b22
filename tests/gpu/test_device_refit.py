"""Refitting open engines with other weights, without a build."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.runtime.format.manifest import FileRecord, read_manifest

from .conftest import Load
from .requests import LEVELS, ask, assert_near, difference

pytestmark = pytest.mark.gpu

WEIGHTS = "onnx/unet.motion.weights"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle with another motion module."""
    folder = Path(shutil.copytree(demo_bundle(), tmp_path_factory.mktemp("other") / "bundle"))
    path = folder / WEIGHTS
    values = np.fromfile(path, np.float32)
    values *= np.random.default_rng(7).uniform(-1.5, 1.5, values.shape).astype(np.float32)  # keeps the magnitude
    values.tofile(path)
    manifest = read_manifest(folder)
    record = FileRecord(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=path.stat().st_size)
    manifest.model_copy(update={"files": {**manifest.files, WEIGHTS: record}}).write(folder)
    return folder


@pytest.fixture
def refittable(backend: str, load: Load) -> VideoPipeline:
    """A pipeline on engines that were built for refit; skips the backend that cannot refit. A failed build fails."""
    if backend == "onnxruntime-cuda":
        pytest.skip("ONNX Runtime cannot refit")
    return load(refit=True)


@pytest.mark.parametrize("controlnet", ["scribble", None])
def test_a_refit_gives_the_frames_of_the_other_bundle_and_back(
    refittable: VideoPipeline, other: Path, controlnet: str | None
) -> None:
    expected = ask(VideoPipeline.load(other, "onnxruntime"), controlnet)
    first = ask(refittable, controlnet)
    assert difference(first, expected) > 2 * LEVELS
    for _ in range(2):
        refittable.refit(other)
        for _ in range(2):  # a plain run, then a CUDA graph; neither may use old weights
            assert_near(ask(refittable, controlnet), expected)
        refittable.refit(None)
        for _ in range(2):
            np.testing.assert_array_equal(ask(refittable, controlnet), first)


def test_engines_that_open_after_a_refit_get_the_other_weights(refittable: VideoPipeline, other: Path) -> None:
    first = ask(refittable)
    refittable.refit(other)
    refitted = ask(refittable)
    refittable.close()
    np.testing.assert_array_equal(ask(refittable), refitted)
    refittable.refit(None)
    np.testing.assert_array_equal(ask(refittable), first)


def test_requests_name_their_weights(refittable: VideoPipeline, other: Path) -> None:
    expected = ask(VideoPipeline.load(other, "onnxruntime"))
    pipeline = VideoPipeline(refittable.bundle, refittable.executor, {"other": other})
    first, named = ask(pipeline), ask(pipeline, weights="other")
    assert_near(named, expected)
    for _ in range(2):
        np.testing.assert_array_equal(ask(pipeline), first)
        np.testing.assert_array_equal(ask(pipeline, weights="other"), named)


def test_what_cannot_be_refitted_says_so_and_goes_on_as_before(load: Load, other: Path) -> None:
    pipeline = load()
    first = ask(pipeline)
    with pytest.raises(BackendError, match="^refit: [^\n]*$"):
        pipeline.refit(other)
    np.testing.assert_array_equal(ask(pipeline), first)
