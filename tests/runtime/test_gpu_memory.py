"""Device memory on the emulated device: it is bounded, given back, and nothing of it leaks."""

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.emulated_demo import REQUESTS, SIZE, emulated_demo, fresh, keyframes
from fakes.gpu_emulation import emulate
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.gpu.captures import MAX_GRAPHS
from sparsectrl_lcm.runtime.gpu.cuda import DeviceOutOfMemory
from sparsectrl_lcm.runtime.gpu.executor import MAX_SIZES


@pytest.fixture
def demo() -> SimpleNamespace:
    """The demo bundle on an emulated device, whose engines return digests of their inputs."""
    return emulated_demo()


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
    size = ClipSize(width=64, height=64, frames=8)
    demo = emulated_demo(size, kept_bytes=8_000_000)

    def request(index: int) -> dict[str, Any]:
        options = REQUESTS[index % len(REQUESTS)]
        given = {"keyframes": keyframes(1 + index % 3, seed=index), "seed": index, **options}
        return given | {"width": size.width, "height": size.height, "num_frames": size.frames}

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
    machine.pipeline.close()
    assert machine.cudart.leaked == []


def test_residuals_beyond_the_bound_are_computed_step_by_step() -> None:
    machine = emulated_demo(kept_bytes=1_000_000)
    for options in REQUESTS[:5]:
        request = {"keyframes": keyframes(), "seed": 1, **options}
        assert (machine.pipeline.generate("a boat", **request).frames == fresh("a boat", **request)).all()
    machine.loader.enqueued.clear()
    machine.pipeline.generate("a dog", keyframes(), seed=1, num_inference_steps=3)
    loop = ["text_encoder", *["controlnet_scribble", "unet", "lcm_update"] * 3, "vae_decoder"]
    assert machine.loader.enqueued[: len(loop)] == loop


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
    assert list(cudart_.streams.queues) == [0], "the default stream"
