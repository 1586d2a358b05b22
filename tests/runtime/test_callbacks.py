"""Progress, cancelling, and frames as they are decoded."""

from pathlib import Path

import numpy as np
import pytest
from pictures import pictures
from sparsectrl_lcm.runtime import Cancelled, Clip, Keyframe, Progress, VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest
from sparsectrl_lcm.runtime.cpu import executor as host
from sparsectrl_lcm.runtime.output.recording import Recording

SMALL = {"seed": 1, "num_frames": 6, "num_inference_steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def demo_pipeline() -> VideoPipeline:
    return VideoPipeline.load(backend="onnxruntime")


def test_progress_and_timings() -> None:
    pipeline = VideoPipeline.load(backend="onnxruntime")
    image = pictures(1, 64, 64)[0]
    seen: list[Progress] = []
    clip = pipeline.generate("a boat", [Keyframe(0, image)], "rgb", seed=1, on_progress=seen.append)
    fractions = [item.fraction for item in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    stages = ["load", "text", "keyframes", "control", "denoise", "decode"]
    assert [item.stage for item in seen if item.step == 0] == stages
    assert [item.stage for item in seen if item.step == item.steps] == stages
    assert [item.step for item in seen if item.stage == "denoise"] == [0, 1, 2, 3, 4]
    assert clip.timings.keys() == {*stages, "total"}
    assert sum(clip.timings[stage] for stage in stages) == pytest.approx(clip.timings["total"], rel=0.2)


@pytest.mark.parametrize("stage", ["load", "text", "keyframes", "control", "denoise", "decode"])
def test_a_request_can_be_cancelled_between_steps(stage: str, demo_pipeline: VideoPipeline) -> None:
    pipeline = VideoPipeline.load(backend="onnxruntime")
    request = SMALL | {"num_inference_steps": 2, "keyframes": [Keyframe(0, pictures(1, 64, 64)[0])]}
    seen: list[Progress] = []

    def cancel(progress: Progress) -> bool:
        seen.append(progress)
        return (progress.stage, progress.step) != (stage, 1)

    with pytest.raises(Cancelled, match=f"cancelled after {stage} 1 of"):
        pipeline.generate("a boat", **request, on_progress=cancel)
    assert [(item.stage, item.step) for item in seen][-1] == (stage, 1)
    expected, after = (made.generate("a boat", **request) for made in (demo_pipeline, pipeline))
    assert isinstance(after, Clip)
    assert (after.frames == expected.frames).all(), "a cancelled request does not affect the next"


@pytest.mark.parametrize(
    ("side", "frames", "chunk"),
    [(512, 16, 1), (256, 16, 1), (128, 16, 4), (128, 6, 3), (128, 7, 1), (64, 16, 16), (64, 5, 5)],
)
def test_as_many_frames_are_decoded_at_a_time_as_make_256x256_pixels(
    demo_pipeline: VideoPipeline, side: int, frames: int, chunk: int
) -> None:
    """The parts are equal and have at least one frame."""
    request = CheckedRequest("a boat", "", (), None, 4, 1.0, 0, height=side, width=side, frames=frames)
    assert request.layout(demo_pipeline.bundle.manifest.sizes, host.DECODE_PIXELS).decoded == chunk


@pytest.fixture
def in_parts(demo_pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> VideoPipeline:
    """Makes the pipeline decode two small frames at a time."""
    monkeypatch.setattr(host, "DECODE_PIXELS", 2 * 64 * 64)
    return demo_pipeline


def test_frames_come_as_they_are_decoded(in_parts: VideoPipeline) -> None:
    events: list[object] = []
    parts: list[np.ndarray] = []

    def on_frames(first: int, frames: np.ndarray) -> None:
        events.append(first)
        parts.append(frames.copy())

    def on_progress(progress: Progress) -> None:
        if progress.stage == "decode":
            events.append(f"{progress.step} of {progress.steps}")

    clip = in_parts.generate("a boat", **SMALL, on_progress=on_progress, on_frames=on_frames)
    assert events == ["0 of 3", 0, "1 of 3", 2, "2 of 3", 4, "3 of 3"]
    assert [part.shape for part in parts] == [(2, 64, 64, 3)] * 3
    assert (np.concatenate(parts) == clip.frames).all()
    assert (in_parts.generate("a boat", **SMALL).frames == clip.frames).all()


def test_what_on_frames_raises_ends_the_request(in_parts: VideoPipeline) -> None:
    error = RuntimeError("the reader has gone")
    seen: list[int] = []

    def on_frames(first: int, _: np.ndarray) -> None:
        seen.append(first)
        if first == 2:
            raise error

    with pytest.raises(RuntimeError) as raised:
        in_parts.generate("a boat", **SMALL, on_frames=on_frames)
    assert raised.value is error
    assert seen == [0, 2]
    assert len(in_parts.generate("a boat", **SMALL).frames) == 6


@pytest.mark.parametrize("step", [1, 3])
def test_a_cancelled_request_leaves_no_file(in_parts: VideoPipeline, tmp_path: Path, step: int) -> None:
    """Also if it is cancelled after the last frame."""
    with pytest.raises(Cancelled), Recording(tmp_path / "clip.mp4") as recording:
        in_parts.generate(
            "a boat",
            **SMALL,
            on_progress=lambda progress: (progress.stage, progress.step) != ("decode", step),
            on_frames=recording.add,
        )
    assert list(tmp_path.iterdir()) == []
