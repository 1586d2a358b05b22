"""Previews: a frame of each step as it predicts it, on the CPU and on an emulated GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from fakes.gpu_emulation import PortableGraphs, emulate
from pictures import pictures
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.backends import open_executor
from sparsectrl_lcm.runtime.load_options import LoadOptions
from sparsectrl_lcm.runtime.loop.previews import COLOURS, latent_colours

Made = tuple[np.ndarray, list[tuple[int, int, np.ndarray]]]
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 6, "seed": 3, "num_inference_steps": 3}
WINDOWS = {"context_length": 4, "context_overlap": 2}
MIDDLE = 3


@pytest.fixture(scope="module")
def host() -> VideoPipeline:
    return VideoPipeline.load(backend="onnxruntime")


@pytest.fixture(scope="module")
def make(host: VideoPipeline) -> Callable[..., Made]:
    """Makes a clip and its previews on the CPU, or on a device; remembers those of the CPU."""
    known: dict[str, Made] = {}

    def make(pipeline: VideoPipeline = host, **options: Any) -> Made:
        name = str(options)
        if pipeline is not host or name not in known:
            seen: list[tuple[int, int, np.ndarray]] = []
            keyframes = [Keyframe(1, pictures(1, 64, 64)[0])]
            clip = pipeline.generate(
                "a boat", keyframes, **SMALL | options, on_preview=lambda *given: seen.append(given)
            )
            if pipeline is not host:
                return clip.frames, seen
            known[name] = clip.frames, seen
        return known[name]

    return make


@pytest.fixture(scope="module")
def graphs(host: VideoPipeline) -> PortableGraphs:
    return PortableGraphs(host.bundle)


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["in one piece", "in windows"])
def test_each_step_shows_the_middle_frame_that_it_predicts(make: Callable[..., Made], options: Any) -> None:
    """The last step predicts the clip itself. The first one predicts what a clip of one step is."""
    _, previews = make(**options)
    assert [(step, index, frame.shape) for step, index, frame in previews] == [
        (step, MIDDLE, (64, 64, 3)) for step in (1, 2, 3)
    ]
    for step, steps in ((3, 3), (1, 1)):
        frames, _ = make(**options, decoder="tiny", num_inference_steps=steps)
        assert_close(previews[step - 1][2], frames[MIDDLE])
    assert (previews[1][2] != previews[2][2]).any()


def test_previews_change_nothing_of_the_clip(host: VideoPipeline, make: Callable[..., Made]) -> None:
    frames, _ = make()
    plain = host.generate("a boat", [Keyframe(1, pictures(1, 64, 64)[0])], **SMALL)
    assert "previews" not in plain.timings
    np.testing.assert_array_equal(plain.frames, frames)


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["in one piece", "in windows"])
def test_previews_of_a_gpu_are_those_of_the_cpu(
    graphs: PortableGraphs, make: Callable[..., Made], options: Any
) -> None:
    """Of a first run, and of replays, also if requests without previews come between."""
    machine = emulate(graphs.bundle, graphs)
    device = VideoPipeline(graphs.bundle, machine.executor)
    expected, expected_previews = make(**options)
    plain = {**SMALL, **options, "keyframes": [Keyframe(1, pictures(1, 64, 64)[0])]}
    replayed = []
    for _ in range(3):
        frames, previews = make(device, **options)
        replayed.append(machine.executor.replayed)
        assert_close(frames, expected)
        assert [step for step, *_ in previews] == [1, 2, 3]
        for mine, theirs in zip(previews, expected_previews, strict=True):
            assert_close(mine[2], theirs[2])
        assert_close(device.generate("a boat", **plain).frames, expected)
    assert replayed[-1] or options
    device.close()
    assert machine.cudart.leaked == []


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["in one piece", "in windows"])
def test_without_a_tiny_decoder_the_latents_are_shown(
    host: VideoPipeline, graphs: PortableGraphs, make: Callable[..., Made], options: Any
) -> None:
    """The last preview has the colours of the latents that the decoder gets."""
    manifest = host.bundle.manifest
    others = {name: graph for name, graph in manifest.graphs.items() if name != "vae_decoder_tiny"}
    bundle = replace(host.bundle, manifest=manifest.model_copy(update={"graphs": others}))
    decoded: list[np.ndarray] = []

    def compute(graph: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if graph == "vae_decoder":
            decoded.extend(feeds["latents"].copy())
        return graphs(graph, feeds)

    device = VideoPipeline(bundle, emulate(bundle, compute).executor)
    _, previews = make(device, **options)
    assert [(step, index, frame.shape) for step, index, frame in previews] == [
        (step, MIDDLE, (8, 8, 3)) for step in (1, 2, 3)
    ]
    np.testing.assert_array_equal(previews[-1][2], latent_colours(decoded[MIDDLE]))
    of_host = make(VideoPipeline(bundle, open_executor(bundle, "onnxruntime", LoadOptions())), **options)[1]
    for mine, theirs in zip(previews, of_host, strict=True):
        assert_close(mine[2], theirs[2])


def test_colours_of_latents() -> None:
    """Against torch, and the grey of latents that are zero."""
    assert (latent_colours(np.zeros((4, 2, 3), np.float32)) == 128).all()
    latents = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    image = latents.permute(1, 2, 0) @ torch.from_numpy(COLOURS)
    expected = ((image + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert_close(latent_colours(latents.numpy()), expected.numpy())
