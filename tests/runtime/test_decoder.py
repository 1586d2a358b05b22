"""Requests with the tiny decoder: frames against diffusers, on both kinds of executors; opened graphs and kept data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from conftest import Exported
from diffusers import AutoencoderTiny
from fakes.gpu_emulation import Digests, PortableGraphs, emulate
from pictures import pictures
from PIL import Image
from references import sparsectrl_pipeline, to_uint8
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import InvalidRequest, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes

WIDTH, HEIGHT, FRAMES, STEPS, SEED = 128, 64, 3, 1, 5
SIZE: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "num_inference_steps": STEPS}
GRAPHS = {"full": "vae_decoder", "tiny": "vae_decoder_tiny"}


def ask(pipeline: VideoPipeline, decoder: str, **options: Any) -> Any:
    keyframes = [Keyframe(1, pictures(1, WIDTH, HEIGHT)[0])]
    return pipeline.generate("a red boat", keyframes, **{"seed": SEED, "decoder": decoder, **SIZE, **options})


def difference(frames: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(frames.astype(int) - others).max())


@pytest.fixture(scope="module")
def host(sd15_like: Exported) -> Iterator[VideoPipeline]:
    pipeline = VideoPipeline.load(sd15_like.bundle, "onnxruntime")
    yield pipeline
    pipeline.close()


def test_frames_are_those_of_diffusers(sd15_like: Exported, host: VideoPipeline) -> None:
    """Against diffusers' pipeline with AutoencoderTiny instead of its VAE."""
    reference = sparsectrl_pipeline(sd15_like.checkpoints, "scribble")
    reference.vae = AutoencoderTiny.from_pretrained(sd15_like.checkpoints / "tiny_decoder")
    expected = reference(
        "a red boat",
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        conditioning_frames=pictures(1, WIDTH, HEIGHT),
        controlnet_frame_indices=[1],
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).frames[0]
    frames = ask(host, "tiny").frames
    assert frames.std() > 10, "a flat clip would prove nothing"
    assert np.isin(frames, (0, 255)).mean() < 0.05
    assert_close(frames, to_uint8(expected))


def test_only_what_a_request_asks_for_is_opened_and_the_rest_is_kept(host: VideoPipeline) -> None:
    host.close()
    first = ask(host, "tiny")
    opened = host.executor.sessions._sessions  # type: ignore[attr-defined]
    assert "vae_decoder" not in opened
    assert {"text", "control"} <= first.timings.keys()
    second = ask(host, "full")
    assert {"text", "keyframes", "control"} & second.timings.keys() == set(), (
        "the conditioning does not depend on the decoder"
    )
    assert opened.keys() == {"text_encoder", "controlnet_scribble", "unet", "lcm_update", *GRAPHS.values()}
    assert difference(first.frames, second.frames) > 3


def test_frames_on_the_device_are_those_of_the_cpu(sd15_like: Exported, host: VideoPipeline) -> None:
    """Covers first runs with each decoder, kept conditioning and replays."""
    bundle = Bundle.load(sd15_like.bundle)
    machine = emulate(bundle, PortableGraphs(bundle))
    device = VideoPipeline(bundle, machine.executor)
    expected = {decoder: ask(host, decoder).frames for decoder in GRAPHS}
    replays = []
    for decoder in ("tiny", "full", "tiny", "full", "tiny"):
        clip = ask(device, decoder)
        assert_close(clip.frames, expected[decoder])
        replays.append("capture" not in clip.timings)
    assert replays == [False, False, False, False, True], "three captures, the second proof of the second, a replay"
    device.close()
    assert machine.cudart.leaked == []


def test_each_decoder_has_engines_and_graphs_of_its_own(sd15_like: Exported) -> None:
    bundle = Bundle.load(sd15_like.bundle)
    size = ClipSize(width=WIDTH, height=HEIGHT, frames=FRAMES)
    machine = emulate(bundle, Digests(bundle, lambda graph: static_shapes(bundle.manifest, graph, size)))
    device, enqueued = VideoPipeline(bundle, machine.executor), machine.loader.enqueued
    first = ask(device, "tiny")
    (workspace,) = machine.executor._workspaces.values()
    assert "vae_decoder" not in workspace.open_graphs
    assert enqueued[-1] == "vae_decoder_tiny"
    enqueued.clear()
    second = ask(device, "full")
    assert "control" not in second.timings, "the conditioning does not depend on the decoder"
    assert enqueued == ["unet", "lcm_update", "vae_decoder"] * 2, "first run, then captured"
    assert {GRAPHS["full"], GRAPHS["tiny"]} <= set(workspace.open_graphs)
    assert (first.frames != second.frames).any()
    for decoder, clip in (("tiny", first), ("full", second), ("tiny", first), ("full", second)):
        assert (ask(device, decoder).frames == clip.frames).all()


def test_what_is_allowed_is_said(host: VideoPipeline) -> None:
    for value in ("fast", "", None, 1, "vae_decoder_tiny"):
        with pytest.raises(InvalidRequest, match=r"^decoder: .* is not in this bundle; allowed are full, tiny$"):
            host.generate("a boat", decoder=value)  # type: ignore[arg-type]


def test_the_command_line(
    sd15_like: Exported, host: VideoPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, picture = str(sd15_like.bundle), tmp_path / "picture.png"
    pictures(1, WIDTH, HEIGHT)[0].save(picture)
    command = ["generate", "--bundle", bundle, "--backend", "onnxruntime", "--prompt", "a red boat"]
    command += ["--keyframe", f"1={picture}", "--size", f"{WIDTH}x{HEIGHT}", "--frames", str(FRAMES)]
    command += ["--steps", str(STEPS), "--seed", str(SEED), "--decoder", "tiny"]
    assert run([*command, "-o", str(tmp_path / "frames")]) == 0
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())]
    assert (np.stack(frames) == ask(host, "tiny").frames).all()
    capsys.readouterr()
    assert run(["inspect", bundle]) == 0
    shown = capsys.readouterr().out
    assert "vae_decoder_tiny" in shown
    assert "tiny decoder:" in shown, "its source"
