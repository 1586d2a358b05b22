"""What a clip was made from, in its file: read by PyAV and Pillow, by `inspect`, and left out on request."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime.output.clip import Clip
from sparsectrl_lcm.runtime.output.recording import Recording

from sparsectrl_lcm import VideoPipeline

PROMPT = 'ein "roter" Stern \\ \u661f'
OUTPUTS = ("clip.mp4", "clip.webm", "clip.gif", "clip.webp", "clip.png", "frames")


@pytest.fixture(scope="module")
def clip() -> Clip:
    size: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 2}
    pipeline = VideoPipeline.load(backend="onnxruntime")
    return pipeline.generate(PROMPT, num_inference_steps=1, seed=2**64 - 1, clip_skip=1, **size)


def independently_read(path: Path) -> str | None:
    """The comment, by the readers that other programs use."""
    if path.suffix in (".mp4", ".webm"):
        with av.open(str(path)) as container:
            return {name.lower(): text for name, text in container.metadata.items()}.get("comment")
    with Image.open(path / "frame_001.png" if path.is_dir() else path) as image:
        if path.suffix == ".webp":
            return image.getexif().get(0x010E)
        comment = image.info.get("comment" if path.suffix == ".gif" else "Comment")
    return comment.decode() if isinstance(comment, bytes) else comment


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_says_what_it_was_made_from(
    name: str, clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clip.save(tmp_path / name)
    found = json.loads(independently_read(path) or "")
    assert found == clip.metadata
    assert (found["prompt"], found["seed"], found["num_inference_steps"]) == (PROMPT, 2**64 - 1, 1)
    assert (found["guidance_scale"], found["clip_skip"], found["bundle"]) == (1.0, 1, "demo_bundle")
    assert found["software"].startswith("sparsectrl-lcm 0.") and "decoder" not in found
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert run(["inspect", str(path)]) == 0
    assert PROMPT in capsys.readouterr().out
    without = clip.save(tmp_path / f"without-{name}", metadata=False)
    assert not independently_read(without)
    assert run(["inspect", str(without)]) == 2
    assert "does not say what it was made from" in capsys.readouterr().err


def test_generate_writes_metadata_unless_told_not_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--size", "64x64", "--frames", "2", "--steps", "1", "--backend", "onnxruntime"]
    for name, more in (("a.mp4", []), ("b.mp4", ["--no-metadata"])):
        assert run(["generate", "--prompt", PROMPT, *small, *more, "-o", str(tmp_path / name)]) == 0
    found = json.loads(independently_read(tmp_path / "a.mp4") or "")
    assert f"seed {found['seed']}," in capsys.readouterr().out
    assert independently_read(tmp_path / "b.mp4") is None


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_recording_writes_the_metadata_that_is_at_hand(name: str, clip: Clip, tmp_path: Path) -> None:
    """Frames that are added only at the end leave a video, too, to be begun when the clip is complete."""
    for folder, metadata in (("given", clip.metadata), ("own", None), ("none", {})):
        with Recording(tmp_path / folder / name, metadata=metadata) as recording:
            path = recording.save(clip)
        found = independently_read(path)
        assert (json.loads(found) if found else {}) == ({} if folder == "none" else clip.metadata)


def test_a_clip_names_the_weights_that_it_was_made_with(clip: Clip) -> None:
    """Also if a refit waits for the clip's end."""
    pipeline = VideoPipeline.load(backend="onnxruntime")
    other = replace(pipeline.bundle, folder=Path("other"))

    class Lock:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            pipeline._weights._base = pipeline._weights._fitted = other  # as a refit whose turn comes now

    pipeline._lock = Lock()  # type: ignore[assignment]
    pipeline.executor.run = lambda *_: (clip.frames, {})  # type: ignore[method-assign]
    assert pipeline.generate("a", num_frames=2).metadata["bundle"] == "demo_bundle"
    assert pipeline.generate("a", num_frames=2).metadata["bundle"] == "other"
