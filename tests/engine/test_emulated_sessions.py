"""Emulated engines give the numbers of torch, which computes the same typed graph in fp16 or bf16 itself."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sparsectrl_lcm.engine.check import Feeds, random_inputs, run_portable
from sparsectrl_lcm.engine.emulated_sessions import EmulatedSessions
from sparsectrl_lcm.engine.rewrites.typed_graph import typed_graph
from sparsectrl_lcm.runtime import BackendError, VideoPipeline
from sparsectrl_lcm.runtime.cpu.executor import HostExecutor
from sparsectrl_lcm.runtime.cpu.sessions import Array
from sparsectrl_lcm.runtime.format.bundle import Bundle
from torch_engines.programs import compile_graph, dtype_of


@pytest.fixture(scope="module")
def fp16() -> Iterator[EmulatedSessions]:
    yield from opened("fp16")


@pytest.fixture(scope="module")
def bf16() -> Iterator[EmulatedSessions]:
    yield from opened("bf16")


@pytest.fixture(params=["fp16", "bf16"])
def emulated(request: pytest.FixtureRequest, fp16: EmulatedSessions, bf16: EmulatedSessions) -> EmulatedSessions:
    return fp16 if request.param == "fp16" else bf16


def opened(precision: str) -> Iterator[EmulatedSessions]:
    sessions = EmulatedSessions(Bundle.load(), "tensorrt", precision)
    yield sessions
    sessions.close()


def with_torch(bundle: Bundle, graph: str, precision: str, feeds: Feeds) -> list[Array]:
    """The typed graph in torch, operator by operator, in its own types."""
    model = typed_graph(bundle, graph, precision)
    program = compile_graph(model, {name: array.shape for name, array in feeds.items()}, {})
    inputs = {str(item.name): torch.from_numpy(feeds[str(item.name)]).to(dtype_of(item)) for item in model.graph.inputs}
    shapes = [array.shape for array in exact(bundle, graph, feeds)]
    outputs = {
        str(item.name): torch.empty(shape, dtype=dtype_of(item))
        for item, shape in zip(model.graph.outputs, shapes, strict=True)
    }
    with torch.no_grad():
        program.run({**program.constants, **inputs}, outputs)
    return [tensor.float().numpy() for tensor in outputs.values()]


def exact(bundle: Bundle, graph: str, feeds: Feeds) -> list[Array]:
    (outputs,) = run_portable(bundle.folder / bundle.graph(graph).path, feeds)
    return list(outputs.values())


def run(sessions: EmulatedSessions, graph: str, feeds: Feeds) -> list[Array]:
    sessions.open(graph, {})
    return sessions.session(graph).run(feeds)


def error(actual: list[Array], expected: list[Array]) -> float:
    """The root mean square of the differences, relative to that of the values."""
    pairs = list(zip(actual, expected, strict=True))
    difference = sum(float(np.square(left - right.astype(np.float32)).sum()) for left, right in pairs)
    return float(np.sqrt(difference / sum(float(np.square(right, dtype=np.float64).sum()) for _, right in pairs)))


@pytest.mark.parametrize("graph", ["text_encoder", "vae_decoder_tiny"])
def test_shallow_graphs_give_the_numbers_of_torch(emulated: EmulatedSessions, graph: str) -> None:
    """Sums in another order may round a value the other way, which few operators seldom carry to an output."""
    bundle = Bundle.load()
    feeds = random_inputs(bundle, graph)
    (actual,), (expected,) = run(emulated, graph, feeds), with_torch(bundle, graph, emulated.precision, feeds)
    assert (actual != expected).mean() < (actual != exact(bundle, graph, feeds)[0]).mean() / 5


def test_residuals_are_as_far_from_fp32_as_those_of_torch(emulated: EmulatedSessions) -> None:
    bundle = Bundle.load()
    feeds = random_inputs(bundle, "controlnet_scribble")
    expected = exact(bundle, "controlnet_scribble", feeds)
    found = error(run(emulated, "controlnet_scribble", feeds), expected)
    assert found == pytest.approx(
        error(with_torch(bundle, "controlnet_scribble", emulated.precision, feeds), expected), rel=0.2
    )


def test_inputs_are_rounded_to_their_types(bf16: EmulatedSessions) -> None:
    feeds = random_inputs(Bundle.load(), "unet")
    rounded = torch.from_numpy(feeds["prompt_embeds"]).to(torch.bfloat16).float().numpy()
    assert not np.array_equal(rounded, feeds["prompt_embeds"])
    (actual,), (expected,) = (run(bf16, "unet", each) for each in (feeds, {**feeds, "prompt_embeds": rounded}))
    np.testing.assert_array_equal(actual, expected)


def test_a_request_runs_on_emulated_engines(bf16: EmulatedSessions) -> None:
    """The frames differ from those of fp32 as much as rounding explains."""
    bundle = Bundle.load()
    options = {"num_frames": 2, "num_inference_steps": 1, "seed": 1, "height": 64, "width": 64, "guidance_scale": 1.5}
    frames = VideoPipeline(bundle, HostExecutor(bundle, bf16, 0)).generate("a red circle", **options).frames
    expected = VideoPipeline.load(backend="onnxruntime").generate("a red circle", **options).frames
    assert 0 < np.abs(frames.astype(int) - expected).mean() < 2


def test_a_cpu_backend_is_not_emulated() -> None:
    with pytest.raises(BackendError, match="openvino is not emulated"):
        EmulatedSessions(Bundle.load(), "openvino", "bf16")
    with pytest.raises(BackendError, match="'int8' is unknown to tensorrt"):
        EmulatedSessions(Bundle.load(), "tensorrt", "int8")
