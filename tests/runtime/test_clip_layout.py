"""The layout of a clip: its numbers against the inputs and outputs of the graphs."""

from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import (
    ENGINE_DECODE_PIXELS,
    ClipLayout,
    ClipSize,
    engine_layout,
    frames_decoded_at_a_time,
    static_shapes,
)

CLIPS = [ClipSize(width=64, height=96, frames=4), ClipSize(width=104, height=72, frames=3)]


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.load(None)


def layouts(demo: Bundle, clip: ClipSize) -> list[ClipLayout]:
    """The layout of engines, and of a request with guidance, one keyframe and frames decoded one by one."""
    return [
        engine_layout(demo.manifest, clip),
        ClipLayout(demo.manifest.sizes, clip, prompts=2, keyframes=1, decoded=1),
    ]


def random(shape: tuple[int, ...], dtype: str, limit: int) -> np.ndarray:
    """Random values below `limit`, valid for every input of their type."""
    values: Any = np.random.default_rng(0).integers(0, limit, shape)
    return values.astype(dtype) if dtype in ("uint8", "int64") else (values / limit).astype(dtype)


def test_every_graph_runs_with_the_inputs_of_a_layout_and_gives_its_outputs(demo: Bundle) -> None:
    """Runs each graph on ONNX Runtime, which does not use the layout."""
    for name, record in demo.manifest.graphs.items():
        session = onnxruntime.InferenceSession(Path(demo.folder) / record.path, providers=["CPUExecutionProvider"])
        for clip in CLIPS:
            for layout in layouts(demo, clip):
                shapes = layout.shapes(name, record)
                feeds = {item.name: random(shapes[item.name], item.dtype, limit=2) for item in record.inputs}
                outputs = dict(zip((item.name for item in record.outputs), session.run(None, feeds), strict=True))
                assert {key: value.shape for key, value in outputs.items()} == {key: shapes[key] for key in outputs}


def test_an_engine_takes_one_prompt_and_all_keyframe_slots(demo: Bundle) -> None:
    manifest, clip = demo.manifest, ClipSize(width=128, height=64, frames=16)
    assert static_shapes(manifest, "text_encoder", clip)["input_ids"] == (1, manifest.max_tokens)
    assert static_shapes(manifest, "unet", clip)["latents"] == (1, 4, 16, 8, 16)
    assert static_shapes(manifest, "controlnet_scribble", clip)["conditioning"] == (4, 64, 128, 3)
    assert static_shapes(manifest, "vae_encoder", clip)["image"] == (3, 64, 128, 3)


@pytest.mark.parametrize(
    ("width", "height", "frames", "decoded"),
    [(512, 512, 16, 8), (512, 512, 8, 8), (512, 512, 12, 6), (256, 256, 16, 16), (768, 512, 16, 4), (704, 704, 13, 1)],
)
def test_frames_that_an_engine_decodes_at_a_time(
    demo: Bundle, width: int, height: int, frames: int, decoded: int
) -> None:
    layout = engine_layout(demo.manifest, ClipSize(width=width, height=height, frames=frames))
    assert (layout.decoded, layout.decoder_runs("vae_decoder")) == (decoded, frames // decoded)
    assert layout.shapes("vae_decoder", demo.graph("vae_decoder"))["frames"] == (decoded, height, width, 3)
    tiny = layout.shapes("vae_decoder_tiny", demo.graph("vae_decoder_tiny"))["frames"]
    assert (tiny, layout.decoder_runs("vae_decoder_tiny")) == ((1, height, width, 3), frames)


def test_parts_are_equal_within_the_bound_and_the_largest() -> None:
    for width, height, frames, bound in product(
        (8, 24, 72, 512), (8, 40, 736), range(1, 33), (1, 64 * 64, ENGINE_DECODE_PIXELS)
    ):
        clip = ClipSize(width=width, height=height, frames=frames)
        decoded = frames_decoded_at_a_time(clip, bound)
        equal = [count for count in range(1, frames + 1) if frames % count == 0]
        assert decoded in equal
        assert decoded == 1 or decoded * width * height <= bound
        assert not any(count > decoded and count * width * height <= bound for count in equal)


def test_the_latent_shape_is_that_of_the_noise(demo: Bundle) -> None:
    layout = engine_layout(demo.manifest, ClipSize(width=96, height=64, frames=5))
    assert layout.latent_shape == (1, 4, 5, 8, 12)
    assert prod(layout.latent_shape) == prod(layout.shapes("lcm_update", demo.graph("lcm_update"))["noise"])
