"""What a clip is made from: the prompt's embeddings and SparseCtrl's residuals, ahead of the loop.

SparseCtrl sees no latents, so its residuals depend on timestep, prompt and keyframes alone. They are computed before
the loop and kept for the next seed; where they would not fit into the memory bound, each step computes its own.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..cpu.sessions import Array, Sessions
from ..format.manifest import Dimension, Manifest, resolve_shape
from ..request import Request
from .tokenizer import ClipTokenizer

Residuals = dict[str, Array]
"""The UNet's residual inputs by name, each [B*F, C, h, w]."""

KEPT_BYTES = 2 * 1024**3
"""Bound on what is kept for later requests."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """The part of a request that the seed does not change.

    Attributes:
        prompt_embeds: float32 [B, 77, D]; with guidance the negative prompt comes first.
        feeds: SparseCtrl's inputs that hold the keyframes; empty without keyframes.
        residuals: one entry per step, or None where each step computes its own.
    """

    prompt_embeds: Array
    feeds: dict[str, Array]
    residuals: tuple[Residuals, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Memory of all its arrays."""
        steps = [self.feeds, *(self.residuals or ())]
        return self.prompt_embeds.nbytes + sum(array.nbytes for step in steps for array in step.values())


@dataclass(slots=True)
class ConditioningCache:
    """The conditionings of the last requests, least recently used first out, within `max_bytes`."""

    max_bytes: int = KEPT_BYTES
    _entries: OrderedDict[Hashable, Conditioning] = field(default_factory=OrderedDict)

    def get(self, key: Hashable) -> Conditioning | None:
        """The conditioning kept under `key`."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def reserve(self, nbytes: int) -> bool:
        """Drops the oldest entries until `nbytes` more fit; False, and nothing dropped, where they never will."""
        if nbytes > self.max_bytes:
            return False
        while self._entries and sum(entry.nbytes for entry in self._entries.values()) + nbytes > self.max_bytes:
            self._entries.popitem(last=False)
        return True

    def put(self, key: Hashable, conditioning: Conditioning) -> None:
        """Keeps a conditioning, if it fits."""
        if self.reserve(conditioning.nbytes):
            self._entries[key] = conditioning


def cache_key(request: Request) -> Hashable:
    """What the conditioning of a request depends on: all but the seed, how strong the guidance is, and the decoder."""
    pictures = tuple((item.index, sha256(item.pixels.tobytes()).digest()) for item in request.keyframes)
    negative = request.negative_prompt if request.guidance else None
    size = (request.height, request.width, request.frames)
    return (request.prompt, negative, pictures, request.controlnet, request.steps, size)


def graphs_of(request: Request, kept: Conditioning | None = None) -> list[str]:
    """The graphs that a request runs, the largest first: while the memory for packing it is still free.

    Args:
        request: the request.
        kept: what an earlier request has left of its conditioning.
    """
    graphs = ["unet"]
    if request.keyframes and (kept is None or kept.residuals is None):
        graphs.append(f"controlnet_{request.controlnet}")
    if kept is None:
        if request.keyframes and request.controlnet == "rgb":
            graphs.append("vae_encoder")
        graphs.append("text_encoder")
    return [*graphs, "lcm_update", request.decoder_graph]


def dimensions_of(graph: str, request: Request, manifest: Manifest, decoded: int) -> dict[str, int]:
    """The symbolic dimensions of a graph's inputs in a request; `decoded` frames are decoded at a time."""
    factor = manifest.sizes.vae_scale_factor
    return {
        "batch": 2 if request.guidance else 1,
        "frames": request.frames,
        "height": request.height,
        "width": request.width,
        "latent_height": request.height // factor,
        "latent_width": request.width // factor,
        "distinct_frames": len(request.keyframes) + 1,
        "images": len(request.keyframes) if graph == "vae_encoder" else decoded,
    }


def encode_prompt(sessions: Sessions, tokenizer: ClipTokenizer, request: Request) -> Array:
    """The prompt's embeddings, float32 [B, 77, D]; with guidance the negative prompt comes first."""
    texts = [request.negative_prompt, request.prompt] if request.guidance else [request.prompt]
    (prompt_embeds,) = sessions.session("text_encoder").run({"input_ids": tokenizer(texts)})
    return prompt_embeds


def keyframe_feeds(sessions: Sessions, request: Request) -> dict[str, Array]:
    """SparseCtrl's inputs that hold the keyframes: each keyframe once and a blank, and each frame's place in them.

    `scribble` takes uint8 pixels [U, H, W, 3]; `rgb` the mode of the VAE's posterior, [U, 4, H/8, W/8].
    """
    pictures: Array = np.stack([item.pixels for item in request.keyframes])  # [K, H, W, 3]
    if request.controlnet == "rgb":
        (pictures,) = sessions.session("vae_encoder").run({"image": pictures})
    blank = len(pictures)
    conditioning = np.concatenate([pictures, np.zeros_like(pictures[:1])])
    mask = np.ones(blank + 1, np.float32)
    mask[blank] = 0
    return {"conditioning": conditioning, "conditioning_mask": mask, "frame_index": frame_index(request, blank)}


def frame_index(request: Request, blank: int) -> NDArray[np.int64]:
    """Each frame's place among the distinct frames, [F]: the keyframes come first, a blank stands at `blank`."""
    index = np.full(request.frames, blank, np.int64)
    for place, item in enumerate(request.keyframes):
        index[item.index] = place
    return index


def residuals_at(
    sessions: Sessions, manifest: Manifest, request: Request, conditioning: Conditioning, timestep: np.float32
) -> Residuals:
    """The UNet's residuals at a timestep; zeros that broadcast where there are no keyframes."""
    names = residual_inputs(manifest)
    if not request.keyframes:
        return {name: np.zeros((1, int(shape[1]), 1, 1), np.float32) for name, shape in names.items()}
    inputs = {"timestep": np.array([timestep]), "prompt_embeds": conditioning.prompt_embeds, **conditioning.feeds}
    return dict(zip(names, sessions.session(f"controlnet_{request.controlnet}").run(inputs), strict=True))


def residual_inputs(manifest: Manifest) -> dict[str, tuple[Dimension, ...]]:
    """Names and symbolic shapes of the UNet's residual inputs."""
    return {item.name: item.shape for item in manifest.graphs["unet"].inputs if "residual" in item.name}


def residual_bytes(manifest: Manifest, request: Request) -> int:
    """Memory of a request's residuals at all steps."""
    sizes = dimensions_of("unet", request, manifest, decoded=1)
    elements = sum(prod(resolve_shape(shape, sizes)) for shape in residual_inputs(manifest).values())
    return 4 * elements * request.steps
