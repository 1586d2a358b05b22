"""Whole requests on the device, compared with the CPU and with other ways to run the same request on the device."""

from collections.abc import Iterator

import numpy as np
import pytest
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.load_options import KEPT_BYTES

from .conftest import Load
from .requests import LEVELS, ask, assert_near, assert_same, captures, keyframes, workspaces

pytestmark = pytest.mark.gpu

SOURCES = ("scribble", "rgb", None)


@pytest.fixture(scope="module")
def cpu() -> Iterator[VideoPipeline]:
    """The portable graphs on ONNX Runtime's CPU provider."""
    pipeline = VideoPipeline.load(None, "onnxruntime")
    yield pipeline
    pipeline.close()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("controlnet", SOURCES)
def test_frames_are_those_of_the_cpu(load: Load, cpu: VideoPipeline, controlnet: str | None, guidance: float) -> None:
    expected = ask(cpu, controlnet, guidance_scale=guidance)
    assert expected.std() > 2 * LEVELS  # plain grey frames would pass otherwise
    assert_near(ask(load(), controlnet, guidance_scale=guidance), expected)


@pytest.mark.parametrize("kept_bytes", [KEPT_BYTES, 0])
@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (4, 1.0), (3, 2.0)])
@pytest.mark.parametrize("controlnet", SOURCES)
def test_a_replayed_graph_gives_the_bits_of_plain_runs(
    load: Load, replays: list[bool], controlnet: str | None, steps: int, guidance: float, kept_bytes: int
) -> None:
    if controlnet is None and not kept_bytes:
        pytest.skip("without keyframes nothing is cached: the same variant")
    pipeline = load(kept_bytes=kept_bytes)

    def frames() -> np.ndarray:
        return ask(pipeline, controlnet, num_inference_steps=steps, guidance_scale=guidance)

    first = frames()
    (workspace,) = workspaces(pipeline)
    captured = captures(pipeline)
    workspace.conditioning_area.forget()
    others = [frames() for _ in range(3)]
    kept = controlnet is not None and kept_bytes > 0
    assert replays == [False, captured, captured and not kept, captured]  # kept conditioning is another variant
    plain = load(kept_bytes=kept_bytes, cuda_graphs=False)
    others += [ask(plain, controlnet, num_inference_steps=steps, guidance_scale=guidance) for _ in range(2)]
    assert replays[4:] == [False, False]
    for other in others:
        assert_same(pipeline, other, first)


def test_two_variants_that_take_turns_keep_apart(load: Load, replays: list[bool]) -> None:
    pipeline = load()
    options = [{"num_inference_steps": 2}, {"num_inference_steps": 2, "guidance_scale": 2.0}, {"controlnet": "rgb"}]
    first = [ask(pipeline, **each) for each in options]
    for _ in range(2):
        for each, expected in zip(options, first, strict=True):
            assert_same(pipeline, ask(pipeline, **each), expected)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("controlnet", ["scribble", "rgb"])
def test_kept_conditioning_gives_the_bits_of_a_fresh_pipeline(load: Load, controlnet: str, guidance: float) -> None:
    pipeline, fresh = load(), load()
    first = ask(pipeline, controlnet, seed=1, guidance_scale=guidance)
    second = ask(pipeline, controlnet, seed=2, guidance_scale=guidance)
    assert not np.array_equal(first, second)
    assert_same(pipeline, second, ask(fresh, controlnet, seed=2, guidance_scale=guidance))
    ask(pipeline, controlnet, seed=2, guidance_scale=guidance, keyframes=keyframes((3, 9)))  # copies the kept one out
    assert_same(pipeline, ask(pipeline, controlnet, seed=1, guidance_scale=guidance), first)
