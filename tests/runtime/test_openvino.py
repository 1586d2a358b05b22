"""OpenVINO: frames against diffusers and ONNX Runtime; what is compiled and refused."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from conftest import Exported
from diffusers import AutoencoderTiny
from pictures import pictures
from references import animatediff_pipeline, sparsectrl_pipeline, to_uint8
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import InvalidRequest, Keyframe, SparseCtrlLcmError, VideoPipeline
from sparsectrl_lcm.runtime.cpu import openvino
from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSessions
from sparsectrl_lcm.runtime.cpu.sessions import Array
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle

SIDES, FRAMES, STEPS, SEED = {"sd15_like": 64, "other": 32}, 3, 2, 5
PROMPT, NEGATIVE = "a red circle moves right", "blue small square"
CASES = {"sd15_like": ("scribble", 2.0, (2, 0)), "other": ("rgb", 1.0, (1,))}
"""Kind of keyframes, guidance, and the keyframes' places, for each architecture."""


@pytest.fixture(scope="module")
def pipeline(exported: Exported) -> Iterator[VideoPipeline]:
    """OpenVINO on portable graphs; what a test has compiled serves the next."""
    opened = VideoPipeline.load(exported.bundle, "openvino")
    yield opened
    opened.close()


def difference(frames: Array, others: Array) -> int:
    return int(np.abs(frames.astype(int) - others).max())


def size_of(exported: Exported) -> dict[str, Any]:
    side = SIDES[exported.name]
    return {"width": side, "height": side, "num_frames": FRAMES, "num_inference_steps": STEPS}


def reference_options(exported: Exported, guidance: float, seed: int) -> dict[str, Any]:
    """The same as diffusers' pipelines call it."""
    return {
        "negative_prompt": NEGATIVE,
        "guidance_scale": guidance,
        **size_of(exported),
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
    }


def test_frames_are_those_of_diffusers(exported: Exported, pipeline: VideoPipeline) -> None:
    """Also those of the next seed, for which all that does not depend on it is kept."""
    controlnet, guidance, indices = CASES[exported.name]
    images = pictures(len(indices), SIDES[exported.name], SIDES[exported.name])
    given = {"conditioning_frames": images, "controlnet_frame_indices": list(indices)}
    keyframes = [Keyframe(index, image) for index, image in zip(indices, images, strict=True)]
    reference = sparsectrl_pipeline(exported.checkpoints, controlnet)
    options: dict[str, Any] = {"controlnet": controlnet, "negative_prompt": NEGATIVE, "guidance_scale": guidance}
    conditioning = {"text", "keyframes", "control"}
    for seed, computed in ((SEED, conditioning), (SEED + 1, set())):
        clip = pipeline.generate(PROMPT, keyframes, **options, seed=seed, **size_of(exported))
        expected = to_uint8(reference(PROMPT, **given, **reference_options(exported, guidance, seed)).frames[0])
        assert expected.std() > 10, "a flat clip would prove nothing"
        assert_close(clip.frames, expected)
        assert clip.timings.keys() & conditioning == computed
    assert (pipeline.backend, pipeline.precision) == ("openvino", "fp32")


def test_without_keyframes_the_clip_is_animatediffs(exported: Exported, pipeline: VideoPipeline) -> None:
    """With guidance, for which the UNet of a request without is not compiled anew."""
    pipeline.generate(PROMPT, seed=SEED, **size_of(exported))
    compiled = pipeline.executor.sessions.session("unet")  # type: ignore[attr-defined]
    reference = animatediff_pipeline(exported.checkpoints)
    expected = to_uint8(reference(PROMPT, **reference_options(exported, 2.0, SEED)).frames[0])
    clip = pipeline.generate(PROMPT, negative_prompt=NEGATIVE, guidance_scale=2, seed=SEED, **size_of(exported))
    assert_close(clip.frames, expected)
    assert pipeline.executor.sessions.session("unet") is compiled  # type: ignore[attr-defined]


def test_each_decoder_is_compiled_once(exported: Exported, pipeline: VideoPipeline) -> None:
    reference = animatediff_pipeline(exported.checkpoints)
    reference.vae = AutoencoderTiny.from_pretrained(exported.checkpoints / "tiny_decoder")
    expected = to_uint8(reference(PROMPT, **reference_options(exported, 1.0, SEED)).frames[0])
    full = pipeline.generate(PROMPT, seed=SEED, **size_of(exported))
    compiled = pipeline.executor.sessions.session("vae_decoder")  # type: ignore[attr-defined]
    tiny = pipeline.generate(PROMPT, seed=SEED, decoder="tiny", **size_of(exported))
    assert_close(tiny.frames, expected)
    assert difference(tiny.frames, full.frames) > 3
    assert (pipeline.generate(PROMPT, seed=SEED, **size_of(exported)).frames == full.frames).all()
    assert pipeline.executor.sessions.session("vae_decoder") is compiled  # type: ignore[attr-defined]


@pytest.mark.slow
def test_sizes_and_lengths_may_change_between_requests(sd15_like: Exported) -> None:
    """One frame with guidance, where the residuals' zeros have as many rows as one prompt; then another size."""
    ours, reference = (VideoPipeline.load(sd15_like.bundle, backend) for backend in ("openvino", "onnxruntime"))
    small: dict[str, Any] = {"width": 64, "height": 32, "num_frames": 1, "guidance_scale": 2}
    high: dict[str, Any] = {"width": 32, "height": 96, "num_frames": 5}
    clips = []
    for request in (small, high, small):
        clips.append(ours.generate(PROMPT, num_inference_steps=2, seed=1, **request))
        expected = reference.generate(PROMPT, num_inference_steps=2, seed=1, **request)
        assert clips[-1].frames.shape == expected.frames.shape
        assert_close(clips[-1].frames, expected.frames)
    assert (clips[0].frames == clips[2].frames).all()


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo bundle in a folder whose name is not plain."""
    return Path(shutil.copytree(demo_bundle(), tmp_path / "Bündel 1"))


@pytest.mark.parametrize("threads", [1, 2, None])
def test_threads_are_those_that_were_asked_for(threads: int | None) -> None:
    sessions = OpenVinoSessions(Bundle.load(), threads=threads)
    sessions.open("lcm_update", {"batch": 1, "frames": 1, "latent_height": 8, "latent_width": 8})
    compiled: Any = sessions.session("lcm_update")._request.get_compiled_model()
    assert compiled.get_property("NUM_STREAMS") == 1
    assert threads is None or compiled.get_property("INFERENCE_NUM_THREADS") == threads
    if threads == 1:
        assert not compiled.get_property("ENABLE_CPU_PINNING"), "two processes would share the first core"


def test_a_session_pulls_in_no_torch_and_reports_no_use(tmp_path: Path) -> None:
    """OpenVINO would write a number for its user to the home folder, and send reports with it."""
    code = (
        "import sys\n"
        "from sparsectrl_lcm.runtime.format.bundle import Bundle\n"
        "from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSessions\n"
        "sizes = {'batch': 1, 'frames': 1, 'latent_height': 8, 'latent_width': 8}\n"
        "OpenVinoSessions(Bundle.load()).open('lcm_update', sizes)\n"
        "unwanted = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime', 'openvino_telemetry'}\n"
        "print(*(unwanted & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == []
    assert not list(tmp_path.glob("intel*"))


BAD = [
    ({"backend": "openvino", "precision": "fp16"}, "precision: 'fp16' is unknown to openvino; allowed are bf16, fp32"),
    (
        {"backend": "openvino", "precision": "bf16"},
        r"bf16 engines were not built; run: sparsectrl-lcm build \S+ --backend openvino --precision bf16$",
    ),
    ({"backend": "openvino", "device": "TPU"}, "device: OpenVINO finds no 'TPU' here; available are .*CPU"),
    ({"device": "TPU"}, "device: OpenVINO finds no 'TPU' here; available are .*CPU"),
    ({"backend": "onnxruntime", "device": "CPU"}, "device: only for openvino; leave it out for onnxruntime$"),
    ({"backend": "tensorrt", "threads": 2}, "threads: only for openvino, onnxruntime; leave it out for tensorrt$"),
    ({"backend": "onnxruntime", "precision": "bf16"}, "precision: onnxruntime computes in fp32 on the CPU; 'bf16' is"),
    ({"threads": 0}, "threads: 0 is not allowed; give a whole number from 1 on$"),
    ({"backend": "openvino", "threads": -1}, "threads: -1 is not allowed; give a whole number from 1 on$"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_a_backend_does_not_have_is_one_line(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SparseCtrlLcmError, match=message) as error:
        VideoPipeline.load(**options)
    assert "\n" not in str(error.value)
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert run(["generate", "--prompt", "a boat", *arguments, "-o", str(tmp_path / "clip.mp4")]) == 2
    output = capsys.readouterr()
    assert output.err.replace("error: --", "error: ") == f"error: {error.value}\n"
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_another_device_chooses_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "check_device", lambda device: None)
    message = "precision: 'bf16' is only for OpenVINO's CPU; leave it out for 'GPU.0'"
    with pytest.raises(SparseCtrlLcmError, match=message):
        OpenVinoSessions(Bundle.load(), "bf16", "GPU.0")


def test_the_options_of_generate_reach_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def load(*arguments: Any, **options: Any) -> None:
        seen.append((arguments, options))
        raise InvalidRequest("", "seen")

    monkeypatch.setattr(VideoPipeline, "load", load)
    options = ["--backend", "openvino", "--device", "GPU", "--precision", "int8", "--threads", "3"]
    assert run(["generate", "--prompt", "a boat", *options, "-o", str(tmp_path / "clip.gif")]) == 2
    assert seen == [((None, "openvino"), {"precision": "int8", "device": "GPU", "threads": 3})]
    assert capsys.readouterr().err == "error: seen\n"


def test_build_needs_openvino(demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert run(["build", str(demo), "--backend", "openvino"]) == 2
    expected = "error: backend: OpenVINO is not installed; run: pip install 'sparsectrl-lcm[openvino]'\n"
    assert capsys.readouterr().err == expected
