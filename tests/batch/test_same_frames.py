"""The demo bundle gives the same frames by `generate`, by `batch`, also after a kill, and by `generate_many`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sparsectrl_lcm.runtime import ClipRequest, Keyframe, VideoPipeline

from sparsectrl_lcm import cli

SCRIBBLES = Path(__file__).parent.parent.parent / "demo/scribbles"
LINES = [
    {"id": "plain", "prompt": "a red circle", "seed": 3},
    {"id": "control", "prompt": "a star", "seed": 4, "keyframe_0_image_url": str(SCRIBBLES / "frame_00.png")},
    {"id": "guided", "prompt": "a star", "negative_prompt": "red", "guidance_scale": 1.5, "seed": 5},
]
SIZE = {"width": 64, "height": 64, "frames": 4, "num_inference_steps": 2}


def pixels(path: Path) -> np.ndarray:
    """The contact sheet, which has all frames without loss."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_all_ways_give_the_same_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("requests.jsonl").write_text("\n".join(json.dumps(line | SIZE) for line in reversed(LINES)))
    command = ["batch", "requests.jsonl", "-o", "out", "--format", "png", "--backend", "onnxruntime", "--resume"]
    program = "import sys; from sparsectrl_lcm.cli import main; main(sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", program, *command], stderr=subprocess.DEVNULL) as process:
        while not os.path.exists("out/guided.png"):  # noqa: PTH110
            assert process.poll() is None or os.path.exists("out/guided.png")  # noqa: PTH110
        process.kill()
    assert cli.run(command) == 0

    common = ["--size", "64x64", "--frames", "4", "--steps", "2", "--backend", "onnxruntime"]
    own = [
        ["--prompt", "a red circle", "--seed", "3"],
        ["--prompt", "a star", "--seed", "4", "--keyframe", f"0={SCRIBBLES / 'frame_00.png'}"],
        ["--prompt", "a star", "--seed", "5", "--negative-prompt", "red", "--guidance", "1.5"],
    ]
    size = {"width": 64, "height": 64, "num_frames": 4, "num_inference_steps": 2}
    requests = [
        ClipRequest("a red circle", seed=3, **size),
        ClipRequest("a star", [Keyframe(0, SCRIBBLES / "frame_00.png")], seed=4, **size),
        ClipRequest("a star", negative_prompt="red", guidance_scale=1.5, seed=5, **size),
    ]
    results = VideoPipeline.load(backend="onnxruntime").generate_many(requests)
    for line, arguments, result in zip(LINES, own, results, strict=True):
        made = pixels(tmp_path / f"out/{line['id']}.png")
        assert cli.run(["generate", *arguments, *common, "-o", f"{line['id']}.png"]) == 0
        assert (pixels(tmp_path / f"{line['id']}.png") == made).all()
        assert (pixels(result.get().save(f"many-{line['id']}.png")) == made).all()
