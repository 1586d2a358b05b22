"""The GPU loop on an emulated device: the CPU backend's frames, the order of CUDA calls, and faults."""

import gc
import json
import logging
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Exported
from cuda.bindings import runtime as cudart
from fakes.cuda_emulation import EmulatedCudart
from fakes.emulated_demo import SIZE, SMALL, emulated_demo, fresh, fresh_small, keyframes, small_clip
from fakes.gpu_emulation import PortableGraphs, RoundedGraphs, emulate
from pictures import pictures
from sparsectrl_lcm.runtime import BackendError, Cancelled, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.weights import WeightTable
from sparsectrl_lcm.runtime.gpu.buffers import host_array
from sparsectrl_lcm.runtime.gpu.captures import MAX_GRAPHS
from sparsectrl_lcm.runtime.gpu.cuda import Cuda, DeviceLost, DeviceOutOfMemory
from sparsectrl_lcm.runtime.gpu.executor import MAX_SIZES

ERRORS = cudart.cudaError_t


@pytest.fixture
def demo() -> SimpleNamespace:
    """The demo bundle on an emulated device, whose engines return digests of their inputs."""
    return emulated_demo()


REQUESTS: list[dict[str, Any]] = [
    {},
    {"seed": 2},
    {"guidance_scale": 2, "negative_prompt": "blue"},
    {"guidance_scale": 2, "negative_prompt": "blue", "num_inference_steps": 1},
    {"controlnet": "rgb"},
    {"keyframes": ()},
    {"conditioning_scale": 0.5, "control_guidance_end": 0.5},
    {"num_inference_steps": 7},
    {"control_guidance_start": 0.5},
    {"conditioning_scale": 0},
    {},
]


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
        assert np.abs(clips[0].frames.astype(int) - clips[1].frames).max() <= 1, options


def test_frames_of_fp16_are_within_three_levels(tmp_path: Path) -> None:
    """Whole requests with every result rounded to fp16, against fp32: both kinds of keyframes, guidance, neither."""
    bundle = Bundle.load()
    machine = emulate(bundle, RoundedGraphs(bundle, "fp16", tmp_path), cuda_graphs=False)
    device, host = VideoPipeline(bundle, machine.executor), VideoPipeline.load(backend="onnxruntime")
    for options in ({}, {"controlnet": "rgb", "guidance_scale": 2, "negative_prompt": "blue"}, {"keyframes": ()}):
        request = {"keyframes": keyframes(3), "seed": 5, "num_frames": 7, "num_inference_steps": 2, **options}
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
    assert np.abs(clips[0].frames.astype(int) - clips[1].frames).max() <= 1


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
        assert np.abs(clips[0].frames.astype(int) - clips[1].frames).max() <= 1, count
    assert machine.loader.closed.count("unet") == 1
    device.close()
    assert machine.cudart.leaked == []


def test_guidance_runs_the_same_engines_twice(demo: SimpleNamespace) -> None:
    demo.pipeline.generate("a boat", keyframes(), seed=1, guidance_scale=2, num_inference_steps=1)
    loop = ["text_encoder"] * 2 + ["controlnet_scribble"] * 2 + ["unet"] * 2 + ["lcm_update", "vae_decoder"]
    assert demo.loader.enqueued == loop * 2


def test_the_least_recent_graph_is_given_back(demo: SimpleNamespace) -> None:
    for steps in range(1, MAX_GRAPHS + 1):
        demo.pipeline.generate("a boat", seed=1, num_inference_steps=steps)
    assert len(demo.cudart.graphs) == 2 + 3 * (MAX_GRAPHS - 1), "a single step is two graphs, any other number three"
    demo.pipeline.generate("a boat", seed=1, num_inference_steps=1)  # used again, so 2 is the oldest
    demo.cudart.calls.clear()
    demo.pipeline.generate("a boat", seed=1, num_inference_steps=12)
    assert demo.cudart.calls.count("cudaGraphExecDestroy") == 3
    assert demo.cudart.calls.index("cudaGraphExecDestroy") < demo.cudart.calls.index("cudaStreamBeginCapture")
    for steps, captured in ((1, 0), (2, 3)):
        demo.cudart.calls.clear()
        demo.pipeline.generate("a boat", seed=1, num_inference_steps=steps)
        assert demo.cudart.calls.count("cudaStreamBeginCapture") == captured


def test_memory_does_not_grow() -> None:
    demo = emulated_demo(kept_bytes=64_000_000)

    def request(index: int) -> dict[str, Any]:
        options = REQUESTS[index % len(REQUESTS)]
        return {"keyframes": keyframes(1 + index % 3, seed=index), "seed": index, **options}

    def measure(first: int) -> int:
        used = 0
        for index in range(first, first + 50):
            demo.pipeline.generate(f"prompt {index}", **request(index))
            used = max(used, demo.cudart.used)
        return used

    settled = measure(0)
    for first in (50, 100, 150):
        assert measure(first) <= settled
    assert len(demo.cudart.graphs) <= 3 * MAX_GRAPHS
    demo.pipeline.close()
    assert demo.cudart.leaked == []


def test_sizes_are_bounded_and_given_back() -> None:
    bundle = Bundle.load()
    machine = emulate(bundle, lambda graph, feeds: outputs(bundle, graph, feeds))
    pipeline = VideoPipeline(bundle, machine.executor)
    for side in (64, 128, 192):
        clip = pipeline.generate("a boat", seed=1, width=side, height=side, num_frames=2, num_inference_steps=1)
        assert clip.frames.shape == (2, side, side, 3)
    assert len(machine.executor._workspaces) == MAX_SIZES
    assert len(machine.loader.closed) == 4, "the engines of the first size"
    pipeline.close()
    assert machine.cudart.leaked == []


def outputs(bundle: Bundle, graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Zeros in the input shapes of a graph."""
    name = {"text_encoder": "input_ids", "vae_decoder": "latents", "unet": "latents", "lcm_update": "latents"}[graph]
    shape = feeds[name].shape
    match graph:
        case "text_encoder":
            width = next(item for item in bundle.graph("unet").inputs if item.name == "prompt_embeds").shape[2]
            return [np.zeros((1, 77, int(width)), np.float32)]
        case "unet":
            return [np.zeros(shape, np.float32)]
        case "lcm_update":
            return [np.zeros(shape, np.float32), np.zeros((shape[2], shape[1], *shape[3:]), np.float32)]
    return [np.zeros((shape[0], 8 * shape[2], 8 * shape[3], 3), np.uint8)]


# Kept conditioning


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


def test_kept_conditioning_is_bounded() -> None:
    probe = emulated_demo()
    probe.pipeline.generate("a boat", keyframes(), seed=1)
    one = probe.executor._workspaces[SIZE].conditioning_area.nbytes
    machine = emulated_demo(kept_bytes=3 * one)
    for seed in range(6):
        machine.pipeline.generate("a boat", keyframes(seed=seed), seed=1)
    area = machine.executor._workspaces[SIZE].conditioning_area
    assert area.nbytes + sum(nbytes for _, nbytes in area._copies.values()) <= 3 * one
    timings = [machine.pipeline.generate("a boat", keyframes(seed=seed), seed=1).timings for seed in (4, 3, 0)]
    assert ["control" in each for each in timings] == [False, False, True]


def test_residuals_beyond_the_bound_are_computed_step_by_step() -> None:
    machine = emulated_demo(kept_bytes=1_000_000)
    for options in REQUESTS[:5]:
        request = {"keyframes": keyframes(), "seed": 1, **options}
        assert (machine.pipeline.generate("a boat", **request).frames == fresh("a boat", **request)).all()
    machine.loader.enqueued.clear()
    machine.pipeline.generate("a dog", keyframes(), seed=1, num_inference_steps=3)
    loop = ["text_encoder", *["controlnet_scribble", "unet", "lcm_update"] * 3, "vae_decoder"]
    assert machine.loader.enqueued[: len(loop)] == loop


# Faults


def test_where_capture_fails_requests_are_enqueued(demo: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    loop = 1 + 4 + 2 * 4 + 1
    demo.loader.failures = [loop + 3]  # the third engine within the capture
    with caplog.at_level(logging.WARNING):
        clips = [demo.pipeline.generate("a boat", keyframes(seed=seed), seed=1) for seed in range(3)]
    about_scribbles = "checked_request"  # random pictures are none
    warnings = [record.getMessage() for record in caplog.records if record.module != about_scribbles]
    assert len(warnings) == 1
    assert "requests are enqueued one engine at a time" in warnings[0]
    assert demo.cudart.calls.count("cudaStreamBeginCapture") == 1, "the first part"
    assert demo.cudart.calls.count("cudaGraphLaunch") == 0
    for seed, clip in enumerate(clips):
        assert (clip.frames == fresh("a boat", keyframes(seed=seed), seed=1)).all()


def test_a_failed_engine_leaves_the_next_request_whole(demo: SimpleNamespace) -> None:
    demo.loader.failures = [4]
    with pytest.raises(BackendError, match="controlnet_scribble cannot run"):
        demo.pipeline.generate("a boat", keyframes(), seed=1)
    assert (demo.pipeline.generate("a boat", keyframes(), seed=1).frames == fresh("a boat", keyframes(), seed=1)).all()


def test_a_cancelled_request_leaves_the_next_one_whole(demo: SimpleNamespace) -> None:
    seen = []

    def cancel(progress: Any) -> bool:
        seen.append((progress.stage, progress.step))
        return progress.stage != "denoise" or progress.step < 2

    with pytest.raises(Cancelled, match="after denoise 2 of 4"):
        demo.pipeline.generate("a boat", keyframes(), seed=1, on_progress=cancel)
    assert seen[-1] == ("denoise", 2)
    assert (demo.pipeline.generate("a boat", keyframes(), seed=1).frames == fresh("a boat", keyframes(), seed=1)).all()


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


def requests_with_fault(index: int, status: Any) -> tuple[SimpleNamespace, list[Exception | None]]:
    """Four requests, in which the CUDA call at `index` fails: the last replays what the others have captured."""
    machine = emulated_demo(SMALL)
    machine.cudart.fault = (index, status)
    errors: list[Exception | None] = []
    for seed, picture in ((1, 0), (2, 0), (3, 1), (4, 2)):
        try:
            small_clip(machine, "a boat", keyframes(seed=picture), seed=seed)
            errors.append(None)
        except BackendError as error:
            errors.append(error)
    return machine, errors


@cache
def calls_of_requests() -> list[str]:
    """The CUDA calls of the four requests, from the first allocation on."""
    machine, errors = requests_with_fault(1 << 30, None)
    assert errors == [None] * 4
    return list(machine.cudart.calls)  # before the executor is freed, which releases everything


def places(every: bool) -> Iterator[int]:
    """The calls from the first allocation on: every one, or for each function its first and its last call."""
    calls = calls_of_requests()
    start = calls.index("cudaHostAlloc") - 1
    for index in range(start, len(calls)):
        called, name = calls[start:], calls[index]
        ends = (called.index(name), len(called) - 1 - called[::-1].index(name))
        # A failed release need not fail the request; it shows as a leak.
        if (every or index - start in ends) and not name.endswith("Destroy") and name != "cudaFree":
            yield index


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("status", [ERRORS.cudaErrorMemoryAllocation, ERRORS.cudaErrorInvalidValue])
def test_after_a_fault_at_any_call_the_pipeline_recovers(status: Any, every: bool) -> None:
    """At most the request with the fault fails, in one line. The next one has the right frames, and nothing leaks."""
    expected = fresh_small("a boat", keyframes(), seed=4)
    for index in places(every):
        machine, errors = requests_with_fault(index, status)
        call = (index, calls_of_requests()[index])
        failed = [error for error in errors if error is not None]
        assert len(failed) <= 1, call
        assert all("\n" not in str(error) for error in failed)
        frames = small_clip(machine, "a boat", keyframes(), seed=4).frames
        assert (frames == expected).all(), call
        machine.pipeline.close()
        assert machine.cudart.leaked == [], call


def test_a_lost_device_says_that_the_pipeline_has_to_be_loaded_again() -> None:
    calls = calls_of_requests()
    for index in (next(places(True)), calls.index("cudaGraphLaunch"), calls.index("cudaEventSynchronize")):
        _, errors = requests_with_fault(index, ERRORS.cudaErrorLaunchFailure)
        after = [error for error in errors if error is not None]
        assert after, calls[index]
        assert errors[-1] is after[-1], "no further request is tried"
        assert all(isinstance(error, DeviceLost) for error in after)
        assert "load the pipeline again" in str(after[-1])


def test_what_a_lost_device_answers_keeps_nothing_of_earlier_requests(demo: SimpleNamespace) -> None:
    demo.executor._lost = ("backend", "of another device", "")
    errors = []
    for _ in range(2):
        with pytest.raises(DeviceLost, match="of another device") as error:
            demo.pipeline.generate("a boat", seed=1)
        errors.append(error.value)
    assert errors[0] is not errors[1], "an exception object keeps the stack frames that it passes"


def test_a_request_that_does_not_fit_is_refused_and_a_smaller_one_runs() -> None:
    bundle = Bundle.load()
    machine = emulate(bundle, lambda graph, feeds: outputs(bundle, graph, feeds), limit=12_000_000)
    pipeline = VideoPipeline(bundle, machine.executor)
    small = {"seed": 1, "width": 64, "height": 64, "num_frames": 2, "num_inference_steps": 1}
    pipeline.generate("a boat", **small)
    with pytest.raises(DeviceOutOfMemory, match=r"512x512x16 does not fit .* GB are free\); take a smaller size"):
        pipeline.generate("a boat", seed=1, width=512, height=512)
    pipeline.generate("a boat", **small)
    pipeline.close()
    assert machine.cudart.leaked == []


def test_memory_of_other_sizes_is_given_back_for_a_request_that_needs_it() -> None:
    bundle = Bundle.load()
    machine = emulate(bundle, lambda graph, feeds: outputs(bundle, graph, feeds), limit=7_000_000)
    pipeline = VideoPipeline(bundle, machine.executor)
    for side in (128, 192, 128, 192):
        pipeline.generate("a boat", seed=1, width=side, height=side, num_inference_steps=1)
    assert len(machine.executor._workspaces) == 1


def test_an_executor_that_nobody_holds_gives_its_memory_back() -> None:
    machine = emulated_demo()
    machine.pipeline.generate("a boat", keyframes(), seed=1)
    cudart_ = machine.cudart
    assert cudart_.memory
    del machine
    gc.collect()
    assert cudart_.leaked == []
    assert cudart_.streams == set()


# Refit


def test_refit_gives_the_engines_other_weights_and_the_base_back(demo: SimpleNamespace, tmp_path: Any) -> None:
    from bundles import with_other_motion_module

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    name = "down_blocks.0.motion_modules.0.proj_in.weight"
    demo.loader.tables["unet"] = table = weight_table(demo.bundle, "unet")
    demo.pipeline.generate("a boat", keyframes(), seed=1)
    demo.pipeline.refit(other)
    assert demo.cudart.graphs == {}, "graphs are captured again"
    graph, weights = demo.loader.refitted.pop()
    assert graph == "unet"
    assert set(weights) == {name for name, record in table.root.items() if "motion" in record.path}
    assert (weights[name] == table.read(Bundle.load(other), name)).all()
    assert (weights[name] != table.read(demo.bundle, name)).any()
    demo.loader.enqueued.clear()
    demo.pipeline.generate("a boat", keyframes(), seed=1)
    assert "controlnet_scribble" in demo.loader.enqueued, "no result of the old weights is kept"

    demo.pipeline.refit(None)
    _, weights = demo.loader.refitted.pop()
    assert all((weights[name] == table.read(demo.bundle, name)).all() for name in weights)
    demo.pipeline.refit(None)
    assert demo.loader.refitted == []


def test_refit_needs_the_same_architecture(demo: SimpleNamespace, sd15_like: Exported) -> None:
    demo.loader.tables["unet"] = weight_table(demo.bundle, "unet")
    demo.pipeline.generate("a boat", seed=1)
    with pytest.raises(BackendError, match="is not the same graph .* same architecture"):
        demo.pipeline.refit(sd15_like.bundle)


@pytest.mark.parametrize("what", ["schedule", "tokenizer"])
def test_refit_needs_the_same_schedule_and_tokenizer(what: str, demo: SimpleNamespace, tmp_path: Path) -> None:
    """AnimateLCM's motion module has a schedule of its own, a textual inversion words of its own."""
    from bundles import with_other_motion_module

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    if what == "schedule":
        manifest["scheduler"]["original_inference_steps"] = 100
    else:
        changed = (other / "tokenizer.json").read_bytes() + b" "
        (other / "tokenizer.json").write_bytes(changed)
        manifest["files"]["tokenizer.json"] = {"sha256": sha256(changed).hexdigest(), "bytes": len(changed)}
    (other / "manifest.json").write_text(json.dumps(manifest))
    demo.loader.tables["unet"] = weight_table(demo.bundle, "unet")
    with pytest.raises(BackendError, match=f"has another {what}; load that bundle instead"):
        demo.pipeline.refit(other)


def test_a_refit_that_fails_leaves_the_old_weights(demo: SimpleNamespace, tmp_path: Path) -> None:
    """The refit fails half-way, or when engines are loaded later."""
    from bundles import with_other_motion_module

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    before = demo.pipeline.generate("a boat", seed=1).frames
    with pytest.raises(BackendError, match="was built without refit; build it again with refit"):
        demo.pipeline.refit(other)
    assert demo.executor.weights is demo.bundle
    assert (demo.pipeline.generate("a boat", seed=1).frames == before).all()

    demo.pipeline.close()
    demo.pipeline.refit(other)  # no engine is open, so this is only found out later
    for _ in range(2):
        with pytest.raises(BackendError, match="was built without refit"):
            demo.pipeline.generate("a boat", seed=1)
    demo.pipeline.refit(None)
    assert (demo.pipeline.generate("a boat", seed=1).frames == before).all()


def test_a_backend_that_can_never_refit_says_so_at_once(
    demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bundles import with_other_motion_module
    from sparsectrl_lcm.runtime.gpu.onnxruntime import OnnxRuntimeCudaLoader

    other = with_other_motion_module(demo.bundle.folder, tmp_path / "other")
    monkeypatch.setattr(demo.loader, "check_refit", OnnxRuntimeCudaLoader().check_refit)
    with pytest.raises(BackendError, match="ONNX Runtime"):
        demo.pipeline.refit(other)
    assert demo.executor.weights is demo.bundle
    demo.pipeline.refit(None)


def test_the_cpu_backend_cannot_refit() -> None:
    with pytest.raises(BackendError, match="load the other bundle instead"):
        VideoPipeline.load(backend="onnxruntime").refit(None)


def weight_table(bundle: Bundle, graph: str) -> WeightTable:
    from sparsectrl_lcm.engine.rewrites import typed_graph as typed

    return typed.weight_table(bundle, graph, typed.typed_graph(bundle, graph, "fp16"))


# The emulation itself


def test_the_emulation_knows_no_call_that_cuda_lacks() -> None:
    with pytest.raises(AttributeError):
        EmulatedCudart().cudaMallocEverything(1)
    emulated = [name.removeprefix("_") for name in vars(EmulatedCudart) if name.startswith("_cuda")]
    assert all(callable(getattr(cudart, name)) for name in emulated)
    assert set(calls_of_requests()) <= set(emulated)


def test_what_is_copied_to_the_host_arrives_when_the_host_waits() -> None:
    cuda = Cuda(EmulatedCudart())
    device, host = cuda.allocate(1), cuda.allocate_host(1)
    content = host_array(host, (1,), "uint8")
    content[0] = 1
    cuda.fill(device, 2, 1)
    cuda.copy_out(host, device, 1)
    cuda.fill(device, 3, 1)
    assert content[0] == 1
    cuda.synchronize()
    assert content[0] == 2, "what it was when the copy ran"


def test_events_in_a_graph_are_external() -> None:
    api = EmulatedCudart()
    cuda = Cuda(api)
    event = cuda.event()
    cuda.begin_capture()
    cuda.record(event)
    graph = cuda.instantiate(cuda.end_capture())
    assert api.events[event] == -1, "recorded, not run"
    cuda.launch(graph)
    assert api.events[event] > 0
