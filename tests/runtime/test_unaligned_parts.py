"""Clips on a GPU whose frames are decoded in parts that begin at addresses which engines do not take."""

import numpy as np
import pytest
from closeness import assert_close
from fakes.gpu_emulation import PortableGraphs, emulate
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.format import clip_layout
from sparsectrl_lcm.runtime.format.bundle import Bundle

WIDTH, HEIGHT, FRAMES = 40, 24, 4


def test_frames_are_those_of_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated engines refuse such addresses. The second request is a replay."""
    monkeypatch.setattr(clip_layout, "ENGINE_DECODE_PIXELS", 2 * WIDTH * HEIGHT)
    bundle = Bundle.load()
    machine = emulate(bundle, PortableGraphs(bundle))
    device, host = VideoPipeline(bundle, machine.executor), VideoPipeline.load(backend="onnxruntime")
    for seed in (1, 2):
        request = {"seed": seed, "width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "num_inference_steps": 1}
        clips = [pipeline.generate("a boat", **request).frames for pipeline in (device, host)]
        assert_close(clips[0], clips[1])
        assert [machine.executor.replayed, machine.loader.enqueued.count("vae_decoder")] == [seed == 2, 4]
    request["decoder"] = "tiny"  # frame by frame
    previews: list[list[np.ndarray]] = [[], []]
    for pipeline, seen in zip((device, host), previews, strict=True):
        frames = pipeline.generate(
            "a boat", **request, on_preview=lambda *given, seen=seen: seen.append(given[2])
        ).frames
        seen.append(frames)
    for mine, theirs in zip(*previews, strict=True):
        assert_close(mine, theirs)
