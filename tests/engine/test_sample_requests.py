"""The requests that calibration runs, on graphs that give zeros."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from sparsectrl_lcm.engine.quantization.observer import observe_samples
from sparsectrl_lcm.runtime.cpu.sessions import Array
from sparsectrl_lcm.runtime.example_requests import picture
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ONE_PROMPT
from sparsectrl_lcm.runtime.format.manifest import resolve_shape


class Zeros:
    """Sessions whose graphs give zeros; keeps what came in."""

    backend, precision = "zeros", "fp32"

    def __init__(self, bundle: Bundle) -> None:
        self.seen: dict[str, list[Mapping[str, Array]]] = defaultdict(list)
        self._bundle = bundle
        self._outputs: dict[str, list[Array]] = {}

    def open(self, graph: str, dimensions: Mapping[str, int]) -> None:
        sizes = {**dimensions, **ONE_PROMPT}
        records = self._bundle.graph(graph).outputs
        self._outputs[graph] = [np.zeros(resolve_shape(item.shape, sizes), item.dtype) for item in records]

    def session(self, graph: str) -> "ZeroGraph":
        return ZeroGraph(self.seen[graph], self._outputs[graph])

    def close(self) -> None:
        pass


class ZeroGraph:
    def __init__(self, seen: list[Mapping[str, Array]], outputs: list[Array]) -> None:
        self.seen, self.outputs = seen, outputs

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        self.seen.append(feeds)
        prompts = len(feeds.get("input_ids", feeds.get("prompt_embeds", "1")))
        return [np.repeat(output, prompts, axis=0) for output in self.outputs]


def test_calibration_sees_clips_with_few_and_with_many_keyframes(tmp_path: Path) -> None:
    """SparseCtrl's values grow with the share of frames that have a keyframe."""
    bundle = Bundle.load()
    sessions = Zeros(bundle)
    observe_samples(bundle, tmp_path, {}, sessions)
    for kind in bundle.manifest.controlnets:
        runs = sessions.seen[f"controlnet_{kind}"]
        shares = {float(feeds["conditioning_mask"][feeds["frame_index"]].mean()) for feeds in runs}
        assert shares == {3 / 16, 3 / 4}
    assert {feeds["latents"].shape[2] for feeds in sessions.seen["unet"]} == {bundle.manifest.sizes.frames, 4}


def test_sample_pictures_have_details() -> None:
    """In a smooth picture neighbouring pixels are alike. The latents of its VAE are small."""
    steps = np.abs(np.diff(picture(0.5, 128, 96).astype(int), axis=1))
    assert np.quantile(steps, 0.97) > 32
