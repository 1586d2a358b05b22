"""CUDA graphs that replay wrongly, or do not fit into memory, on the emulated device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import runtime as cudart
from fakes.cuda_emulation import Work
from fakes.emulated_demo import SMALL, emulated_demo, fresh_small, keyframes, small_clip, told
from fakes.gpu_emulation import EmulatedEngine, EngineRun
from sparsectrl_lcm.runtime import BackendError, Cancelled
from sparsectrl_lcm.runtime.gpu.captures import MORE_MEMORY
from sparsectrl_lcm.runtime.gpu.cuda import DeviceLost

Distort = Callable[[list[Work]], list[Work]]

LEFT_OUT = {"scribble": range(1 + 4 + 2 * 4 + 1), "rgb": (1,), None: (0,)}
"""Engine runs to leave out of a request with 4 steps: each with scribbles, the VAE's encoder, the text encoder."""


@pytest.fixture
def demo() -> SimpleNamespace:
    return emulated_demo(SMALL)


def ask(demo: SimpleNamespace, controlnet: str | None = "scribble", seed: int = 1, **options: Any) -> Any:
    """A clip with keyframes that follow the seed, or without keyframes; fails if its frames are not the right ones."""
    request: dict[str, Any] = {"seed": seed, **options}
    if controlnet is not None:
        request = {"keyframes": keyframes(seed=seed), "controlnet": controlnet, **request}
    clip = small_clip(demo, "a boat", **request)
    if "on_progress" not in options:
        assert (clip.frames == fresh_small("a boat", **request)).all()
    return clip


def empty(work: list[Work]) -> list[Work]:
    return []


def without(place: int) -> Distort:
    """Leaves out one engine run of a request."""
    seen = 0

    def distort(work: list[Work]) -> list[Work]:
        nonlocal seen
        kept = []
        for item in work:
            left_out = isinstance(item, EngineRun) and seen == place
            seen += isinstance(item, EngineRun)
            kept += [] if left_out else [item]
        return kept

    return distort


def swapped(first: str, second: str, graph: str) -> Distort:
    """Exchanges two addresses of an engine's last run in each part."""

    def distort(work: list[Work]) -> list[Work]:
        runs = [index for index, item in enumerate(work) if isinstance(item, EngineRun) and item.engine.graph == graph]
        for index in runs[-1:]:
            run = work[index]
            assert isinstance(run, EngineRun)
            addresses = {**run.addresses, first: run.addresses[second], second: run.addresses[first]}
            work = [*work[:index], replace(run, addresses=addresses), *work[index + 1 :]]
        return work

    return distort


DISTORTIONS: dict[str, tuple[str | None, Distort]] = {
    "empty": ("scribble", empty),
    "residuals": ("scribble", swapped("down_residual_0", "down_residual_1", "unet")),
    "guidance": ("scribble", swapped("negative", "latents", "lcm_update")),
    **{f"{kind}-{place}": (kind, without(place)) for kind, places in LEFT_OUT.items() for place in places},
}


@pytest.mark.parametrize("distortion", DISTORTIONS)
def test_a_graph_that_replays_wrongly_is_given_up(
    demo: SimpleNamespace, caplog: pytest.LogCaptureFixture, distortion: str
) -> None:
    """Empty graphs, graphs that lack an engine run, and graphs with wrong addresses."""
    controlnet, demo.cudart.distort = DISTORTIONS[distortion]
    for seed in (1, 2):
        ask(demo, controlnet, seed)
    assert len(told(caplog.records)) == 1
    assert "gave other frames" in caplog.text
    assert demo.cudart.executable == set()


def test_other_kinds_of_requests_keep_their_graphs(demo: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    demo.cudart.distort = empty
    ask(demo)
    demo.cudart.distort = list
    for seed in (2, 3):
        ask(demo, None, seed)
        ask(demo, "scribble", seed)
    assert len(told(caplog.records)) == 1
    assert len(demo.cudart.executable) == 3, "those of requests without keyframes"
    demo.loader.enqueued.clear()
    ask(demo, None)
    assert demo.loader.enqueued == []


def test_the_conditioning_of_a_failed_proof_is_not_kept(demo: SimpleNamespace) -> None:
    demo.cudart.distort = empty
    frames = keyframes()
    for seed in (1, 2):
        demo.loader.enqueued.clear()
        clip = small_clip(demo, "a boat", frames, seed=seed)
        assert (clip.frames == fresh_small("a boat", frames, seed=seed)).all()
        assert demo.loader.enqueued.count("controlnet_scribble") >= 4
    clip = small_clip(demo, "a boat", frames, seed=3)
    assert "control" not in clip.timings, "a plain run's conditioning is"


def test_a_failed_proof_leaves_kept_conditioning_alone(demo: SimpleNamespace) -> None:
    frames = keyframes()
    small_clip(demo, "a boat", frames, seed=1)
    demo.cudart.distort = empty
    for seed in (2, 3):
        clip = small_clip(demo, "a boat", frames, seed=seed)
        assert (clip.frames == fresh_small("a boat", frames, seed=seed)).all()
        assert "control" not in clip.timings


def test_a_capture_that_spoils_an_earlier_graph_is_noticed(
    demo: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Graphs are proved once more after the next capture, and no more than that."""
    ask(demo, "scribble", 1)
    earlier = set(demo.cudart.executable)
    ask(demo, None, 2)
    for graph in earlier:
        demo.cudart.graphs[graph] = []
    for seed in (3, 4):
        ask(demo, "scribble", seed)
    assert len(told(caplog.records)) == 1
    assert not earlier & demo.cudart.executable


def test_a_graph_is_proved_twice_at_most(demo: SimpleNamespace) -> None:
    kinds = ("rgb", "scribble", None)

    def proved(seed: int) -> list[bool]:
        return ["capture" in ask(demo, kind, seed).timings for kind in kinds]

    assert proved(1) == [True, True, True]
    assert proved(2) == [True, True, False], "no other kind was captured after the last one"
    ask(demo, None, num_inference_steps=2)
    assert proved(3) == [False, False, True]
    ask(demo, None, num_inference_steps=3)
    assert proved(4) == [False, False, False]


def test_the_first_request_of_a_kind_pays_for_capture_and_proof(demo: SimpleNamespace) -> None:
    reports: list[Any] = []
    first = ask(demo, seed=1, on_progress=reports.append)
    fractions = [item.fraction for item in reports]
    assert fractions == sorted(fractions)
    assert reports[-1].fraction == 1.0
    assert first.timings["capture"] > 0
    second = ask(demo, seed=2)
    assert "capture" not in second.timings
    stages = ("text", "keyframes", "control", "denoise", "decode")
    assert [first.timings[stage] for stage in stages] == [second.timings[stage] for stage in stages]


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (BackendError("backend", "it cannot be captured"), nullcontext()),
        (KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
    ],
    ids=["error", "Ctrl-C"],
)
def test_a_capture_that_stops_half_way_leaves_no_graph(
    demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: BaseException, result: AbstractContextManager[Any]
) -> None:
    """An error on the host does not end CUDA's capture: it gives a graph of what was recorded."""
    enqueue = EmulatedEngine.enqueue

    def stopped(self: EmulatedEngine, addresses: Any) -> None:
        if self.loader.cudart.capture is not None and self.graph == "vae_decoder":
            raise error
        enqueue(self, addresses)

    with monkeypatch.context() as patch, result:
        patch.setattr(EmulatedEngine, "enqueue", stopped)
        ask(demo)
    assert demo.cudart.calls.count("cudaStreamBeginCapture") == 3, "the last of three parts"
    assert demo.cudart.capture is None
    assert demo.cudart.graphs == {}
    ask(demo)


def test_a_cancelled_request_is_not_captured(demo: SimpleNamespace) -> None:
    with pytest.raises(Cancelled):
        ask(demo, on_progress=lambda progress: progress.fraction < 1)
    assert "cudaStreamBeginCapture" not in demo.cudart.calls
    ask(demo)


@pytest.mark.parametrize(
    "status", [cudart.cudaError_t.cudaErrorMemoryAllocation, cudart.cudaError_t.cudaErrorInvalidValue]
)
def test_a_launch_that_fails_in_the_proof_costs_no_request(status: Any) -> None:
    probe = emulated_demo(SMALL)
    ask(probe)
    launches = [index for index, name in enumerate(probe.cudart.calls) if name == "cudaGraphLaunch"]
    assert len(launches) == 3
    for index in launches:
        machine = emulated_demo(SMALL)
        machine.cudart.fault = (index, status)
        for seed in (1, 1, 2):
            ask(machine, seed=seed)
        assert machine.cudart.executable == set() or status == cudart.cudaError_t.cudaErrorMemoryAllocation
        machine.pipeline.close()
        assert machine.cudart.leaked == []


def test_a_device_lost_in_the_proof_is_told(demo: SimpleNamespace) -> None:
    probe = emulated_demo(SMALL)
    ask(probe)
    demo.cudart.fault = (probe.cudart.calls.index("cudaGraphLaunch"), cudart.cudaError_t.cudaErrorLaunchFailure)
    for _ in range(2):
        with pytest.raises(DeviceLost, match="load the pipeline again"):
            small_clip(demo, "a boat", keyframes(seed=1), seed=1)


GRAPH_BYTES = 1 << 22


def with_room_for(graphs: int) -> SimpleNamespace:
    """A device with room for a request without keyframes and this many graphs."""
    probe = emulated_demo(SMALL)
    ask(probe, None)
    machine = emulated_demo(SMALL, limit=probe.cudart.used + graphs * GRAPH_BYTES)
    machine.cudart.graph_bytes = GRAPH_BYTES
    return machine


def captures_of(machine: SimpleNamespace, seed: int, **options: Any) -> int:
    """The number of parts that a request captures."""
    machine.cudart.calls.clear()
    ask(machine, None, seed, **options)
    return int(machine.cudart.calls.count("cudaStreamBeginCapture"))


def test_a_capture_that_ran_out_of_memory_is_not_tried_at_every_request(caplog: pytest.LogCaptureFixture) -> None:
    machine = with_room_for(2)
    assert [captures_of(machine, seed) for seed in range(6)] == [3, 0, 0, 0, 0, 0], "the third part did not fit"
    machine.cudart.limit += MORE_MEMORY - 1
    assert captures_of(machine, 7) == 0
    machine.cudart.limit += GRAPH_BYTES  # as if somebody had freed it
    assert [captures_of(machine, seed) for seed in range(2)] == [3, 0]
    assert len(machine.cudart.executable) == 3
    machine.cudart.limit += 3 * GRAPH_BYTES
    assert captures_of(machine, 3, num_inference_steps=2) == 3
    machine.cudart.limit = machine.cudart.used  # what was captured is proved again, however little is free
    assert ["capture" in ask(machine, None, seed).timings for seed in range(2)] == [True, False]
    assert told(caplog.records) == []


def test_graphs_that_do_not_all_fit_do_not_take_turns() -> None:
    machine = with_room_for(5)
    assert captures_of(machine, 1) == 3
    tried = [captures_of(machine, seed, num_inference_steps=2 + 2 * (seed % 2)) for seed in range(8)]
    assert tried == [3, *[0] * 7], "the earlier kind keeps its graphs, the later one is enqueued"
    (workspace,) = machine.executor._workspaces.values()
    workspace.graphs.clear()  # as a refit does
    assert [captures_of(machine, seed, num_inference_steps=2) for seed in range(2)] == [3, 0]


# Noise
