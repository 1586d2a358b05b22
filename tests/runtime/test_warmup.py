"""What is done before the first request: graphs opened and captured; the backend of a process that makes one clip."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.emulated_demo import SMALL, emulated_demo, keyframes
from pictures import pictures
from PIL import Image
from sparsectrl_lcm.runtime import ClipRequest, InvalidRequest, Keyframe
from sparsectrl_lcm.runtime.cpu import openvino
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.load_options import LoadOptions
from sparsectrl_lcm.runtime.one_shot import one_shot_backend

from sparsectrl_lcm import VideoPipeline, cli

SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 2}
KEYFRAMES = [Keyframe(index, image) for index, image in enumerate(pictures(2, 64, 64))]


def test_a_warm_pipeline_compiles_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = VideoPipeline.load(backend="openvino")
    pipeline.warmup(**SIZE, previews=True)
    monkeypatch.setattr(openvino, "compiled_model", lambda *_: pytest.fail("compiled for a request"))
    previews = {"on_preview": lambda *_: None}
    for request in (previews, {"keyframes": KEYFRAMES}, {"keyframes": KEYFRAMES, "controlnet": "rgb"}):
        assert len(pipeline.generate("a star", num_inference_steps=1, seed=1, **SIZE, **request).frames) == 2
    with pytest.raises(InvalidRequest, match="width: 63 is not allowed"):
        pipeline.warmup(width=63)


def test_load_warms_up_for_the_default_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(VideoPipeline, "warmup", lambda self, *size: asked.append(size))
    VideoPipeline.load(backend="onnxruntime")
    assert asked == []
    VideoPipeline.load(backend="onnxruntime", warm=True)
    assert asked == [()]


@pytest.fixture(scope="module")
def warm_gpu() -> SimpleNamespace:
    machine = emulated_demo(SMALL)
    machine.size = {"width": SMALL.width, "height": SMALL.height, "num_frames": SMALL.frames}
    machine.pipeline.warmup(**machine.size, previews=True)
    return machine


@pytest.mark.parametrize(
    ("controlnet", "previews"), [("scribble", False), ("rgb", False), (None, False), ("scribble", True), (None, True)]
)
def test_the_first_request_of_a_warm_gpu_is_replayed(
    warm_gpu: SimpleNamespace, controlnet: str | None, previews: bool
) -> None:
    given = {"keyframes": keyframes(2), "controlnet": controlnet} if controlnet else {}
    given |= {"on_preview": lambda *_: None} if previews else {}
    for seed in (1, 2):
        clip = warm_gpu.pipeline.generate("a boat", seed=seed, **given, **warm_gpu.size)
        assert "capture" not in clip.timings
        assert warm_gpu.executor.replayed


def test_one_clip_of_a_small_model_is_not_worth_a_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate` tells what it takes and why. The frames of the two backends differ by a level at most."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without the graphs of other tests
    bundle = Bundle.load(shutil.copytree(demo_bundle(), tmp_path / "bundle"))
    one, many, large = [ClipRequest("a")], [ClipRequest("a")] * 16, [ClipRequest("a", width=512, height=512)]

    def chosen(requests: list[ClipRequest], **options: Any) -> str:
        return one_shot_backend(bundle, LoadOptions(**options), requests).backend

    def frames(told: str) -> list[np.ndarray]:
        """What `generate` makes of a small request."""
        folder = tmp_path / told.split(maxsplit=1)[0]
        options = ["--bundle", str(bundle.folder), "--size", "64x64", "--frames", "2", "--seed", "1"]
        assert cli.run(["generate", "--prompt", "a star", *options, "-o", str(folder)]) == 0
        assert f": 2 frames of 64x64, seed 1, {told}\n" in capsys.readouterr().out
        return [np.asarray(Image.open(path), np.int16) for path in sorted(folder.iterdir())]

    assert [chosen(one), chosen(many), chosen(large)] == ["onnxruntime", "openvino", "openvino"]
    assert chosen(one, device="CPU") == "openvino"
    small = [ClipRequest("a", **SIZE)]
    assert chosen(small) == "onnxruntime"
    before = frames("onnxruntime fp32 (auto: openvino would compile its graphs for longer than it saves)")
    VideoPipeline.load(bundle.folder, "openvino").warmup(**SIZE)
    after = frames("openvino fp32 (auto: its graphs are compiled already)")
    assert np.abs(np.subtract(before, after)).max() <= 1
    assert [chosen(small), chosen(one)] == ["openvino", "onnxruntime"], "what is compiled already costs nothing"


def test_nothing_is_told_of_keyframes_while_warming_up(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        VideoPipeline.load(backend="onnxruntime").warmup(**SIZE)
    assert caplog.records == []
