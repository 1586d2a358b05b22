"""The GPU loop on an emulated device: the CPU backend's frames, the order of CUDA calls, and kept conditioning."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from closeness import assert_close
from conftest import Exported
from fakes.emulated_demo import REQUESTS, SMALL, emulated_demo, fresh, fresh_small, keyframes, small_clip
from fakes.gpu_emulation import PortableGraphs, RoundedGraphs, emulate
from pictures import pictures
from sparsectrl_lcm.runtime import ClipRequest, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.gpu.cuda import DeviceLost
from sparsectrl_lcm.runtime.loop.noise import TorchGenerator


@pytest.fixture
def demo() -> SimpleNamespace:
    """The demo bundle on an emulated device, whose engines return digests of their inputs."""
    return emulated_demo()


def test_frames_are_those_of_the_cpu_backend(exported: Exported) -> None:
    """Covers first runs, replays, kept conditioning, both kinds of keyframes and guidance, on two architectures."""
    bundle = Bundle.load(exported.bundle)
    machine = emulate(bundle, PortableGraphs(bundle))
    device, host = VideoPipeline(bundle, machine.executor), VideoPipeline.load(exported.bundle, "onnxruntime")
    images = pictures(2, bundle.manifest.sizes.width, bundle.manifest.sizes.height)
    frames = [Keyframe(index, image) for index, image in zip((5, 2), images, strict=True)]
    for options in (*REQUESTS[:7], REQUESTS[0]):
        request = {"keyframes": frames, "seed": 1, "num_frames": 6, "num_inference_steps": 2, **options}
        clips = [pipeline.generate("a red boat", **request) for pipeline in (device, host)]
        assert_close(clips[0].frames, clips[1].frames, options)


def test_frames_of_fp16_are_within_three_levels(tmp_path: Path) -> None:
    """Whole requests with every result rounded to fp16, against fp32: both kinds of keyframes, guidance, neither."""
    bundle = Bundle.load()
    machine = emulate(bundle, RoundedGraphs(bundle, "fp16", tmp_path), cuda_graphs=False)
    device, host = VideoPipeline(bundle, machine.executor), VideoPipeline.load(backend="onnxruntime")
    size = {"width": 64, "height": 64, "num_frames": 7}
    for options in ({}, {"controlnet": "rgb", "guidance_scale": 2, "negative_prompt": "blue"}, {"keyframes": ()}):
        request = {"keyframes": keyframes(3), "seed": 5, **size, "num_inference_steps": 2, **options}
        clips = [pipeline.generate("a red boat", **request) for pipeline in (device, host)]
        difference = np.abs(clips[0].frames.astype(int) - clips[1].frames)
        assert 0 < difference.mean() <= 3, options


@pytest.mark.parametrize("frames", [1, 5])
def test_another_number_of_frames(sd15_like: Exported, frames: int) -> None:
    bundle = Bundle.load(sd15_like.bundle)
    machine = emulate(bundle, PortableGraphs(bundle))
    side = 5 * bundle.manifest.sizes.multiple
    request = {"seed": 1, "num_frames": frames, "height": side, "num_inference_steps": 2}
    clips = [
        pipeline.generate("a red boat", [Keyframe(0, pictures(1, 40, 30)[0])], **request)
        for pipeline in (VideoPipeline(bundle, machine.executor), VideoPipeline.load(sd15_like.bundle, "onnxruntime"))
    ]
    assert_close(clips[0].frames, clips[1].frames)


def test_every_request_gives_what_a_fresh_pipeline_gives(demo: SimpleNamespace) -> None:
    """No buffer, graph or kept conditioning leaks from an earlier request."""
    for options in (*REQUESTS, *REQUESTS):
        request = {"keyframes": keyframes(), "seed": 1, **options}
        assert (demo.pipeline.generate("a boat", **request).frames == fresh("a boat", **request)).all(), options


@pytest.mark.parametrize("controlnet", ["scribble", "rgb"])
def test_fewer_keyframes_leave_nothing_of_more(controlnet: str) -> None:
    """The slots of the last request's other keyframes are blank again."""
    machine = emulated_demo(SMALL)
    for seed, count in enumerate((2, 1, 2, 1)):
        request = {"keyframes": keyframes(count, seed), "seed": seed, "controlnet": controlnet}
        frames = small_clip(machine, "a boat", **request).frames
        assert (frames == fresh_small("a boat", **request)).all(), (seed, count)


def test_calls_of_warm_up_capture_and_replay(demo: SimpleNamespace) -> None:
    calls, enqueued = demo.cudart.calls, demo.loader.enqueued
    demo.pipeline.generate("a boat", keyframes(), seed=1)
    loop = ["text_encoder", *["controlnet_scribble"] * 4, *["unet", "lcm_update"] * 4, "vae_decoder"]
    assert enqueued == [*loop, *loop], "once for the run, once for the capture"
    marks = ["cudaEventCreateWithFlags", "cudaEventRecordWithFlags"]
    conditioning = 1 + 1 + 1 + 4  # the start, text, keyframes, control
    loop_units = 4 + 1  # denoise, decode
    begin = calls.index("cudaStreamBeginCapture")
    first = calls[calls.index("cudaMemsetAsync") + 1 : begin]
    waits = ["cudaEventSynchronize"] * (conditioning + loop_units - 1)
    ends = [*waits, "cudaStreamSynchronize", *["cudaEventElapsedTime"] * len(waits)]
    assert first[first.index("cudaMemcpyAsync") :] == [
        "cudaMemcpyAsync",  # inputs
        *marks * conditioning,
        "cudaMemcpyAsync",  # the first noise
        "cudaMemcpyAsync",  # the rest
        *marks * loop_units,
        "cudaMemcpyAsync",  # frames
        *ends,
    ]
    made = ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy", "cudaGraphUpload"]
    assert calls[begin:] == [
        *["cudaStreamBeginCapture", *["cudaEventRecordWithFlags"] * conditioning, *made],
        *["cudaStreamBeginCapture", *made],
        *["cudaStreamBeginCapture", *["cudaEventRecordWithFlags"] * loop_units, *made],
        *["cudaMemsetAsync"] * 3,  # buffers, conditioning, activations
        *["cudaGraphLaunch"] * 3,
        "cudaMemcpyAsync",  # frames
        "cudaStreamSynchronize",
    ]

    demo.pipeline.generate("a dog", keyframes(seed=3), seed=2)
    calls.clear()
    enqueued.clear()
    demo.pipeline.generate("a tree", keyframes(seed=7), seed=3)
    assert enqueued == []
    start = calls.index("cudaGraphLaunch") - 1
    assert calls[start:] == [
        "cudaMemcpyAsync",  # inputs
        "cudaGraphLaunch",
        "cudaMemcpyAsync",  # the first noise
        "cudaGraphLaunch",
        "cudaMemcpyAsync",  # the rest
        "cudaGraphLaunch",
        "cudaMemcpyAsync",  # frames
        *ends,
    ]
    assert set(calls[:start]) <= {"cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaStreamSynchronize"}


def test_the_next_seed_copies_inputs_launches_and_copies_frames(demo: SimpleNamespace) -> None:
    for seed in (1, 2):
        demo.pipeline.generate("a boat", keyframes(), seed=seed)
    calls = demo.cudart.calls
    calls.clear()
    clip = demo.pipeline.generate("a boat", keyframes(), seed=3)
    assert calls == [
        *["cudaMemcpyAsync", "cudaMemcpyAsync", "cudaGraphLaunch"],  # inputs and the first noise
        *["cudaMemcpyAsync", "cudaGraphLaunch"],  # the other noise
        "cudaMemcpyAsync",  # frames
        *["cudaEventSynchronize"] * 5,
        "cudaStreamSynchronize",
        *["cudaEventElapsedTime"] * 5,
    ]
    assert set(clip.timings) == {"load", "inputs", "denoise", "decode", "total"}


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_only_controlled_steps_run_sparsectrl(kept_bytes: int) -> None:
    """Also if each step computes its own residuals; the next scale takes kept ones."""
    machine = emulated_demo(kept_bytes=kept_bytes)
    middle = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    machine.pipeline.generate("a boat", keyframes(), seed=1, **middle)
    control, step = ["controlnet_scribble"] * 2, ["unet", "lcm_update"]
    loop = [*control, *step * 4] if kept_bytes else [*step, *[control[0], *step] * 2, *step]
    loop = ["text_encoder", *loop, "vae_decoder"]
    assert machine.loader.enqueued == loop * 2
    machine.loader.enqueued.clear()
    scaled = {"seed": 1, "conditioning_scale": 0.5, **middle}
    clip = machine.pipeline.generate("a boat", keyframes(), **scaled)
    assert machine.loader.enqueued.count("controlnet_scribble") == 0, "kept, or replayed"
    assert (clip.frames == fresh("a boat", keyframes(), **scaled)).all()
    assert ("text" in clip.timings) == (not kept_bytes)


def test_more_keyframes_than_slots_open_larger_engines() -> None:
    """As on a backend whose engines take any shape when they are opened; they then serve fewer keyframes too."""
    bundle = Bundle.load()
    machine = emulate(bundle, PortableGraphs(bundle))
    device, host = VideoPipeline(bundle, machine.executor), VideoPipeline.load(backend="onnxruntime")
    size = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 1, "controlnet": "rgb"}
    images = pictures(5, 64, 64)
    for count in (1, 5, 2):
        frames = [Keyframe(-1 - index, image) for index, image in enumerate(images[:count])]
        clips = [pipeline.generate("a boat", frames, seed=1, **size) for pipeline in (device, host)]
        assert_close(clips[0].frames, clips[1].frames, count)
    assert machine.loader.closed.count("unet") == 1
    device.close()
    assert machine.cudart.leaked == []


def test_guidance_runs_the_same_engines_twice(demo: SimpleNamespace) -> None:
    demo.pipeline.generate("a boat", keyframes(), seed=1, guidance_scale=2, num_inference_steps=1)
    loop = ["text_encoder"] * 2 + ["controlnet_scribble"] * 2 + ["unet"] * 2 + ["lcm_update", "vae_decoder"]
    assert demo.loader.enqueued == loop * 2


def test_conditioning_of_the_last_requests_is_kept(demo: SimpleNamespace) -> None:
    sets = [keyframes(seed=seed) for seed in range(3)]
    first = [demo.pipeline.generate("a boat", frames, seed=5).frames for frames in sets]
    demo.loader.enqueued.clear()
    for _ in range(2):
        for frames, wanted in zip(sets, first, strict=True):
            clip = demo.pipeline.generate("a boat", frames, seed=5)
            assert (clip.frames == wanted).all()
            assert "control" not in clip.timings
    assert "controlnet_scribble" not in demo.loader.enqueued


def test_progress_of_a_replay(demo: SimpleNamespace) -> None:
    runs = []
    for seed in (1, 2):
        seen: list[Any] = []
        demo.pipeline.generate("a boat", keyframes(seed=seed), seed=seed, on_progress=seen.append)
        runs.append([(item.stage, item.step, item.steps, item.fraction) for item in seen])
    assert runs[0] == runs[1]
    fractions = [fraction for *_, fraction in runs[0]]
    assert fractions == sorted(fractions)
    assert runs[0][-1] == ("decode", 1, 1, 1.0)
    stages = list(dict.fromkeys(stage for stage, *_ in runs[0]))
    assert stages == ["load", "text", "keyframes", "control", "denoise", "decode"]
    ends = {stage: (step, steps) for stage, step, steps, _ in runs[0]}
    assert all(step == steps for step, steps in ends.values())


def test_frames_are_given_once_when_all_are_here(demo: SimpleNamespace) -> None:
    """For enqueued and replayed requests: an exception of the caller reaches the caller, and the next request works."""
    seen: list[tuple[int, np.ndarray]] = []
    for seed in (1, 2):
        clip = demo.pipeline.generate("a boat", keyframes(), seed=seed, on_frames=lambda *part: seen.append(part))
        assert len(seen) == seed
        first, frames = seen[-1]
        assert first == 0
        assert (frames == clip.frames).all()

    def on_frames(*_: Any) -> None:
        raise DeviceLost("", "of another device")

    with pytest.raises(DeviceLost, match="of another device"):
        demo.pipeline.generate("a boat", keyframes(), seed=3, on_frames=on_frames)
    assert (demo.pipeline.generate("a boat", keyframes(), seed=2).frames == clip.frames).all()


def test_noise_of_another_source_is_that_of_the_cpu_backend(demo: SimpleNamespace) -> None:
    """Also in a capture, a replay and a proof of the graphs, each of which draws it from its beginning."""
    request = ClipRequest("a red boat", keyframes(2), seed=1)
    expected = fresh("a red boat", keyframes(2), seed=9)
    assert not np.array_equal(fresh("a red boat", keyframes(2), seed=1), expected)
    for _ in range(3):
        clip = demo.pipeline.run(request, noise=lambda: TorchGenerator(9))
        assert np.array_equal(clip.frames, expected)
