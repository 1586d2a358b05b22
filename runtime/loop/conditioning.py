"""The conditioning of a clip: prompt embeddings and SparseCtrl's residuals, computed before the loop.

SparseCtrl sees no latents, so its residuals depend only on timestep, prompt and keyframes. They are computed before
the loop and kept for the next seed. If they exceed the memory limit, each step computes its own.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checked_request import CheckedRequest
from ..format.clip_layout import ClipLayout
from ..format.manifest import Dimension, Manifest
from ..load_options import KEPT_BYTES

Array = NDArray[Any]

Residuals = dict[str, Array]
"""The UNet's residual inputs by name, each [B*F, C, h, w]."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """The part of a request that the seed does not change.

    Attributes:
        prompt_embeds: float32 [B, 77*K, D], K chunks of tokens; with guidance the negative prompt comes first.
        feeds: SparseCtrl's inputs that hold the keyframes of the clip; empty without keyframes.
        residuals: for each controlled step those of its windows, or None if each step computes its own.
    """

    prompt_embeds: Array
    feeds: dict[str, Array]
    residuals: tuple[tuple[Residuals, ...], ...] | None = None

    @property
    def nbytes(self) -> int:
        """Memory of all its arrays."""
        parts = [self.feeds, *(window for step in self.residuals or () for window in step)]
        return self.prompt_embeds.nbytes + sum(array.nbytes for part in parts for array in part.values())


@dataclass(slots=True)
class ConditioningCache:
    """The conditionings of recent requests, at most `max_bytes`. Drops the least recently used first."""

    max_bytes: int = KEPT_BYTES
    _entries: OrderedDict[Hashable, Conditioning] = field(default_factory=OrderedDict)

    def get(self, key: Hashable) -> Conditioning | None:
        """The conditioning kept under `key`; None if there is none."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def reserve(self, nbytes: int) -> bool:
        """Drops the oldest entries until `nbytes` more fit. If they never can, drops nothing and returns False."""
        if nbytes > self.max_bytes:
            return False
        while self._entries and sum(entry.nbytes for entry in self._entries.values()) + nbytes > self.max_bytes:
            self._entries.popitem(last=False)
        return True

    def put(self, key: Hashable, conditioning: Conditioning) -> None:
        """Keeps a conditioning, if it fits."""
        if self.reserve(conditioning.nbytes):
            self._entries[key] = conditioning


def cache_key(request: CheckedRequest) -> Hashable:
    """The values that the conditioning depends on: all except seed, decoder, and the scales of guidance and control."""
    pictures = tuple((item.index, sha256(item.pixels.tobytes()).digest()) for item in request.keyframes)
    negative = request.negative_prompt if request.guidance else None
    size = (request.height, request.width, request.frames, request.context_length, request.context_overlap)
    text = (request.prompt, negative, request.clip_skip, request.prompt_weights, request.long_prompts)
    return (text, pictures, request.controlnet, request.steps, request.controlled_steps, size)


def graphs_of(request: CheckedRequest, kept: Conditioning | None = None) -> list[str]:
    """The graphs that a request runs. The largest is opened first, while the memory to pack its weights is free.

    Args:
        request: the request.
        kept: its conditioning, if it was kept from an earlier request.
    """
    graphs = ["unet"]
    if request.keyframes and (kept is None or kept.residuals is None):
        graphs.append(f"controlnet_{request.controlnet}")
    if kept is None:
        if request.keyframes and request.controlnet == "rgb":
            graphs.append("vae_encoder")
        graphs.append("text_encoder")
    return [*graphs, "lcm_update", request.decoder_graph]


def frame_index(request: CheckedRequest, blank: int) -> NDArray[np.int64]:
    """Index of each frame among the distinct frames, [F]: the keyframes come first, the blank one is at `blank`."""
    index = np.full(request.frames, blank, np.int64)
    for place, item in enumerate(request.keyframes):
        index[item.index] = place
    return index


def residual_inputs(manifest: Manifest) -> dict[str, tuple[Dimension, ...]]:
    """Names and symbolic shapes of the UNet's residual inputs."""
    return {item.name: item.shape for item in manifest.graphs["unet"].inputs if "residual" in item.name}


def window_feeds(feeds: dict[str, Array], frames: NDArray[np.int64], keyframes: int) -> dict[str, Array]:
    """SparseCtrl's inputs for some frames of a clip.

    Args:
        feeds: the inputs for the whole clip.
        frames: indices of the frames.
        keyframes: pictures to feed besides the blank one. If fewer of the frames have a keyframe, the rest is blank.
    """
    index = feeds["frame_index"][frames]
    blank = len(feeds["conditioning"]) - 1
    inside = np.setdiff1d(index, [blank])
    pictures = np.concatenate([inside, np.full(keyframes + 1 - len(inside), blank)])
    places = np.full(blank + 1, keyframes, np.int64)
    places[inside] = np.arange(len(inside))
    return {
        "conditioning": feeds["conditioning"][pictures],
        "conditioning_mask": feeds["conditioning_mask"][pictures],
        "frame_index": places[index],
    }


def residual_bytes(manifest: Manifest, layout: ClipLayout, runs: int) -> int:
    """Memory of the residuals of a number of runs of SparseCtrl, in fp32."""
    shapes = layout.shapes("unet", manifest.graphs["unet"])
    return 4 * runs * sum(prod(shapes[name]) for name in residual_inputs(manifest))
