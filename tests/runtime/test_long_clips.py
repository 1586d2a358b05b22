"""Long clips: a GPU on an emulated device against the CPU, options, progress and memory."""

from typing import Any

import numpy as np
import pytest
from closeness import assert_close
from fakes.emulated_demo import SMALL, emulated_demo
from fakes.gpu_emulation import PortableGraphs, emulate
from pictures import pictures
from sparsectrl_lcm.runtime import Cancelled, ClipRequest, InvalidRequest, Keyframe, Progress, VideoPipeline
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.loop.conditioning import ConditioningCache
from sparsectrl_lcm.runtime.request_checks import check_request

PROMPT = "a red circle moves right"
LONG: dict[str, Any] = {
    "num_frames": 24,
    "context_length": 8,
    "context_overlap": 4,
    "num_inference_steps": 2,
    "seed": 3,
}


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return VideoPipeline.load(backend="onnxruntime")


@pytest.fixture(scope="module")
def graphs(pipeline: VideoPipeline) -> PortableGraphs:
    """The graphs of an emulated GPU; a run is not computed twice."""
    return PortableGraphs(pipeline.bundle)


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_frames_of_a_gpu_are_those_of_the_cpu(pipeline: VideoPipeline, graphs: PortableGraphs, kept_bytes: int) -> None:
    """Both kinds of keyframes, guidance and neither; kept residuals and residuals of each step."""
    bundle = pipeline.bundle
    machine = emulate(bundle, graphs, kept_bytes=kept_bytes)
    device = VideoPipeline(bundle, machine.executor)
    images = pictures(3, 64, 64)
    requests: list[dict[str, Any]] = [{"controlnet": "rgb", "guidance_scale": 2.0, "control_guidance_end": 0.5}, {}]
    for options in requests if kept_bytes else requests[:1]:
        given = LONG | {"width": 64, "height": 64, "num_frames": 13, "context_length": 6, "context_overlap": 2}
        given |= {"keyframes": [Keyframe(4 * place, image) for place, image in enumerate(images)], **options}
        expected = pipeline.generate(PROMPT, **given).frames
        assert expected.std() > 10
        runs = [device.generate(PROMPT, **given).frames for _ in range(2)]  # the second with kept residuals
        assert_close(runs[0], expected, options)
        np.testing.assert_array_equal(runs[0], runs[1])
    controls = machine.loader.enqueued.count("controlnet_rgb")
    assert controls == (3 * 2 if kept_bytes else 3 * 2 * 2), "windows of the first step, for each prompt"


def test_long_and_short_clips_leave_nothing_of_each_other() -> None:
    """They share engines and buffers, and the kept residuals; a fault in a window leaves nothing either."""
    machine = emulated_demo(SMALL)
    long: dict[str, Any] = {"num_frames": 10, "context_length": SMALL.frames, "height": 64, "width": 64}
    short = long | {"num_frames": SMALL.frames}
    given = [Keyframe(0, pictures(1, 64, 64)[0])]
    for size, seed, images in ((long, 1, given), (short, 1, given), (short, 2, given), (long, 2, given), (long, 1, [])):
        request = {"keyframes": images, "seed": seed, "num_inference_steps": 2, **size}
        fresh = emulated_demo(SMALL, cuda_graphs=False).pipeline.generate("a boat", **request).frames
        if seed == 2:
            machine.loader.failures = [len(machine.loader.enqueued) + 5]
            with pytest.raises(BackendError, match="cannot run"):
                machine.pipeline.generate("a boat", **request | {"num_inference_steps": 4})
        np.testing.assert_array_equal(machine.pipeline.generate("a boat", **request).frames, fresh)


def test_progress_and_frames_come_in_order(pipeline: VideoPipeline) -> None:
    """Frames that the last part decodes again are handed over once."""
    seen: list[Progress] = []
    parts: list[tuple[int, np.ndarray]] = []
    clip = pipeline.generate(
        PROMPT,
        [Keyframe(-1, pictures(1, 64, 64)[0])],
        **LONG | {"num_frames": 21, "width": 64, "height": 64},
        on_progress=seen.append,
        on_frames=lambda first, frames: parts.append((first, frames.copy())),
    )
    assert [first for first, _ in parts] == [*np.cumsum([0, *(len(frames) for _, frames in parts[:-1])])]
    assert (np.concatenate([frames for _, frames in parts]) == clip.frames).all()
    for stage, steps in {"control": 5 + 5, "denoise": 5 + 5, "decode": 3}.items():
        assert [item.step for item in seen if item.stage == stage] == list(range(steps + 1)), stage
    fractions = [item.fraction for item in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_a_long_clip_can_be_cancelled_between_windows(pipeline: VideoPipeline) -> None:
    def stop(done: Progress) -> bool:
        return (done.stage, done.step) != ("denoise", 2)

    with pytest.raises(Cancelled, match="denoise 2 of"):
        pipeline.generate(PROMPT, **LONG | {"width": 64, "height": 64}, on_progress=stop)


def test_without_memory_for_residuals_the_frames_are_the_same(pipeline: VideoPipeline) -> None:
    """Then each window computes its own: only prompt and keyframes are kept, whatever the length of the clip."""
    kept = []
    images = pictures(2, 64, 64)
    options = LONG | {"width": 64, "height": 64, "num_frames": 12}
    executor: Any = pipeline.executor
    for kept_bytes in (1 << 30, 100_000):
        executor.cache = ConditioningCache(kept_bytes)
        clip = pipeline.generate(PROMPT, [Keyframe(1, images[0]), Keyframe(-1, images[1])], **options)
        (entry,) = executor.cache._entries.values()
        kept.append((clip.frames, entry))
    (frames, all_kept), (others, little) = kept
    np.testing.assert_array_equal(frames, others)
    assert all_kept.residuals is not None
    assert little.residuals is None


def test_windows_are_chosen_by_the_number_of_frames(pipeline: VideoPipeline) -> None:
    """Clips that the backend can make in one piece are; others take windows of the bundle's number of frames."""
    manifest = pipeline.bundle.manifest

    def chosen(in_one_piece: bool = True, **options: Any) -> tuple[int | None, int]:
        checked = check_request(ClipRequest(PROMPT, **options), manifest, lambda size: in_one_piece)
        return checked.context_length, checked.context_overlap

    unnamed = check_request(ClipRequest(PROMPT, num_frames=24), manifest)
    assert unnamed.context_length is None and pipeline.executor.in_one_piece(unnamed.clip_size), "a CPU takes any"
    assert chosen() == chosen(num_frames=32) == (None, 0)
    assert chosen(num_frames=33) == chosen(num_frames=128) == (16, 8)
    assert chosen(False, num_frames=24) == (16, 8)
    assert chosen(False, num_frames=16) == chosen(False, num_frames=8) == (None, 0), "no window is shorter"
    assert chosen(num_frames=24, context_length=12) == (12, 6)
    assert chosen(num_frames=24, context_length=12, context_overlap=0) == (12, 0)
    assert chosen(num_frames=24, context_length=24) == chosen(num_frames=8, context_length=12) == (None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 129}, "num_frames: 129 is not allowed; give a whole number from 1 to 128"),
        ({"context_length": 3}, "context_length: 3 is not allowed; give a whole number from 4 to 32"),
        ({"context_length": 33}, "context_length: 33 .* from 4 to 32"),
        ({"num_frames": 64, "context_overlap": 16}, "context_overlap: 16 is not allowed; .* from 0 to 15"),
        ({"num_frames": 64, "context_length": 8, "context_overlap": 8}, "context_overlap: 8 .* from 0 to 7"),
        ({"context_overlap": True}, "context_overlap: True"),
    ],
)
def test_bad_windows_are_named(pipeline: VideoPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline.generate(PROMPT, **options)


def test_a_gpu_without_engines_for_all_frames_takes_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load()
    machine = emulate(bundle, PortableGraphs(bundle))
    executor, slots = machine.executor, machine.loader.keyframe_slots

    def only_16_frames(bundle: Bundle, size: ClipSize, keyframes: int) -> int:
        if size.frames != 16:
            raise BackendError("backend", "engines were not built")
        return int(slots(bundle, size, keyframes))

    monkeypatch.setattr(machine.loader, "keyframe_slots", only_16_frames)
    sizes = [ClipSize(width=64, height=64, frames=frames) for frames in (16, 24)]
    assert [executor.in_one_piece(size) for size in sizes] == [True, False]
    checked = check_request(ClipRequest(PROMPT, num_frames=24), bundle.manifest, executor.in_one_piece)
    assert checked.window_size == checked.clip_size.model_copy(update={"frames": 16})
