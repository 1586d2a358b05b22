"""The command line as a user runs it, in a separate process."""

import re
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from sparsectrl_lcm.runtime import Cancelled, VideoPipeline
from sparsectrl_lcm.runtime.output import video

from sparsectrl_lcm import cli

ROOT = Path(__file__).parent.parent.parent
SCRIBBLES = ROOT / "demo" / "scribbles"
GENERATE = ("generate", "--prompt", "a boat", "--backend", "onnxruntime")  # this backend compiles nothing


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from sparsectrl_lcm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def run_here(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, which saves a second for the start of another."""
    with chdir(cwd), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = cli.run([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def fails(result: subprocess.CompletedProcess[str], message: str) -> None:
    """Checks for exit code 2, one line on stderr that begins with `error:`, and no traceback."""
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_generate_from_three_scribbles(tmp_path: Path) -> None:
    keyframes = [item for index in (15, 0, 8) for item in ("--keyframe", f"{index}={SCRIBBLES}/frame_{index:02d}.png")]
    result = run(*GENERATE, *keyframes, "--seed", 42, "-o", "out/clip.mp4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"out/clip.mp4: 16 frames of 128x128, seed 42, (openvino|onnxruntime) fp32$", result.stdout, re.M)
    for stage in ("text", "keyframes", "control", "denoise", "decode", "total"):
        assert re.search(rf"\b{stage} \d+\.\d\d", result.stdout)
    assert "100%" in result.stderr
    with av.open(str(tmp_path / "out/clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
        assert len(list(container.decode(video=0))) == 16


@pytest.mark.parametrize("output", ["clip.webm", "clip.gif", "clip.webp", "sheet.png", "frames"])
def test_other_outputs(output: str, tmp_path: Path) -> None:
    arguments = ["--frames", 3, "--size", "64x128", "--steps", 1, "--guidance", 1.5, "--negative-prompt", "night"]
    result = run_here(*GENERATE, *arguments, "-o", output, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 frames of 64x128" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == [output]


def test_a_clip_that_cannot_be_written_is_told_with_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full while the video is encoded."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "encode", full)
    output = tmp_path / "clip.mp4"
    arguments = ["--frames", "2", "--size", "64x64", "--steps", "1", "--seed", "7"]
    assert cli.run(["generate", "--prompt", "a boat", *arguments, "--backend", "onnxruntime", "-o", str(output)]) == 2
    expected = f"error: --output: '{output}' cannot be written: No space left on device; the clip was made with seed 7"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_and_python_agree(tmp_path: Path) -> None:
    from sparsectrl_lcm.runtime import Keyframe

    picture = SCRIBBLES / "frame_08.png"
    arguments = ["--keyframe", f"-2={picture}", "--controlnet", "rgb", "--seed", 5, "--guidance", 2, "--steps", 2]
    arguments += ["--conditioning-scale", 0.5, "--control-start", 0.5]
    arguments += ["--resample", "bilinear", "--context-length", 4, "--context-overlap", 1]
    run(*GENERATE, *arguments, "--size", "96x64", "--frames", 5, "-o", "frames", cwd=tmp_path)
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())])
    size = {"width": 96, "height": 64, "num_frames": 5, "conditioning_scale": 0.5, "control_guidance_start": 0.5}
    clip = VideoPipeline.load(backend="onnxruntime").generate(
        "a boat",
        [Keyframe(3, picture)],
        "rgb",
        num_inference_steps=2,
        guidance_scale=2,
        seed=5,
        resample="bilinear",
        context_length=4,
        context_overlap=1,
        **size,
    )
    assert (frames == clip.frames).all()


def test_scribbles_are_stretched_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def run(_: Any, request: Any, **__: Any) -> None:
        asked.append(request)
        raise Cancelled("", "no clip is needed")

    monkeypatch.setattr(VideoPipeline, "check", run)
    options = ["--prompt", "a boat", "-o", str(tmp_path / "a.gif"), "--backend", "onnxruntime"]
    for more in ([], ["--normalize-scribbles"], ["--normalize-scribbles", "--controlnet", "rgb"]):
        cli.run(["generate", *options, *more])
    assert [request.normalize_scribbles for request in asked] == [False, True, True]
    assert capsys.readouterr().err.count("note: --normalize-scribbles is used only with --controlnet scribble") == 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    good = (SCRIBBLES / "frame_00.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (8001, 8001)).save(folder / "huge.png")
    return folder


BAD = [
    (["--keyframe", "16={}/good.png"], "--keyframe index: 16 is not allowed; give a whole number from -16 to 15"),
    (["--keyframe", "-17={}/good.png"], "--keyframe index: -17 is not allowed; give a whole number from -16 to 15"),
    (["--keyframe", "15={}/good.png", "--keyframe=-1={}/good.png"], "index 15 was given twice"),
    (["--conditioning-scale", "11"], "--conditioning-scale: 11.0 is not allowed; give a number from 0 to 10"),
    (["--control-start", "1"], "--control-start: 1 is not below the end, 1"),
    (["--keyframe", "first={}/good.png"], "--keyframe: 'first=.*' is not allowed; give INDEX=IMAGE"),
    (["--keyframe", "{}/good.png"], "give INDEX=IMAGE"),
    (["--keyframe", "3={}/good.png", "--keyframe", "3={}/good.png"], "index 3 was given twice"),
    (["--keyframe", "0={}/text.png"], "keyframe 0: .* is not an image"),
    (["--keyframe", "0={}/empty.png"], "keyframe 0: .* is not an image"),
    (["--keyframe", "0={}/truncated.png"], "keyframe 0: .* give a readable, whole image"),
    (["--keyframe", "0={}/huge.png"], "keyframe 0: .* allowed are 64 million"),
    (["--keyframe", "0={}/missing.png"], "keyframe 0: .* does not exist"),
    (["--keyframe", "0={}/good.png", "--controlnet", "depth"], "--controlnet: 'depth' .* allowed are scribble, rgb"),
    (["--decoder", "fast"], "--decoder: 'fast' is not in this bundle; allowed are full, tiny"),
    (["--resample", "nearest"], "--resample: 'nearest' is not allowed; allowed are lanczos, bilinear"),
    (["--frames", "64", "--context-overlap", "16"], "--context-overlap: 16 is not allowed; .* from 0 to 15"),
    (["--steps", "0"], "--steps: 0 is not allowed; give a whole number from 1 to 12"),
    (["--steps", "many"], "'--steps'"),
    (["--guidance", "nan"], "--guidance: nan is not allowed; give a number from 0 to 30"),
    (["--seed", "-1"], "--seed: -1 is not allowed"),
    (["--size", "0x0"], "--size height: 0 is not allowed; give a whole number from 8 to 2048"),
    (["--size", "100x128"], "--size width: 100 is not allowed; give a multiple of 8"),
    (["--size", "large"], "--size: 'large' is not allowed; give WIDTHxHEIGHT"),
    (["--size", f"{'9' * 5000}x8"], "is not allowed; give WIDTHxHEIGHT"),
    (["--frames", "129"], "--frames: 129 is not allowed; give a whole number from 1 to 128"),
    (["--fps", "0"], "--fps: 0.0 is not allowed; give a number from 1 to 60"),
    (["--bundle", "/nowhere"], "bundle: '/nowhere' is not a folder"),
    (["--backend", "magic"], "backend: 'magic' is unknown"),
    (["--unknown"], "No such option"),
    (["-o", "/proc/clip.mp4"], "--output: '/proc/clip.mp4' cannot be written"),
    (["-o", "new/folder/clip.mp4", "--steps", "0"], "--steps: 0"),
    (["-o", "clip.avi"], "--output: '.avi' is not a known format"),
    (["-o", "x" * 256], "--output: 'x*' cannot be written: File name too long"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(arguments: list[str], message: str, pictures: Path, tmp_path: Path) -> None:
    given = [text.format(pictures) for text in arguments]
    output = [] if "-o" in given else ["-o", "clip.mp4"]
    fails(run_here("generate", "--prompt", "a boat", *given, *output, cwd=tmp_path), message)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_missing_options(tmp_path: Path) -> None:
    fails(run_here("generate", "-o", "clip.mp4", cwd=tmp_path), "--prompt")
    fails(run_here("export", "--base", "x", cwd=tmp_path), "--motion-adapter and --output are missing")
    motion_module = run_here("export", "motion-module", "--motion-adapter", "x", cwd=tmp_path)
    fails(motion_module, "give BUNDLE, --standalone or both")
    fails(run("paint", cwd=tmp_path), "No such command 'paint'")


def test_inspect(tmp_path: Path) -> None:
    result = run("inspect", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("16 frames of 128x128", "scribble or rgb", "unet", "vae_decoder", "frame"):
        assert text in result.stdout
    fails(run_here("inspect", "/nowhere", cwd=tmp_path), "bundle: '/nowhere' is not a folder")


def test_version_and_help(tmp_path: Path) -> None:
    assert re.match(r"sparsectrl-lcm \d+\.\d+", run("--version", cwd=tmp_path).stdout)
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for command in ("generate", "export", "inspect"):
        assert command in result.stdout
    for command in ("generate", "export", "inspect"):
        assert run_here(command, "--help", cwd=tmp_path).returncode == 0
