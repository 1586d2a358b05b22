"""Clips for training: encoded once by the autoencoder, with keyframes chosen anew each time."""

import hashlib
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from drawing import clip, scribble
from networks import to_pixels
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from transformers import CLIPTokenizer
from world import FRAMES, scene

USUAL = (0, 8, 15)
"""Where half of the training's keyframes stand, as in most requests."""
WORDLESS = 0.1
"""Share of clips without a caption, so that guidance has something to lead away from."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of B clips of F frames.

    Attributes:
        latents: [B, 4, F, h, w], scaled.
        tokens: of the captions, [B, 77] int64.
        kind: of the keyframes, or None.
        keyframes: pictures of K keyframes each, scribbles [B, K, 3, H, W] in 0..1 or latents [B, K, 4, h, w].
        places: their frames, [B, K] int64.
        wanted: which of them there are, [B, K] bool.
        rows: the clips' places among all, [B] int64, where they come from `Clips`.
    """

    latents: Tensor
    tokens: Tensor
    kind: str | None
    keyframes: Tensor
    places: Tensor
    wanted: Tensor
    rows: Tensor | None = None


class Clips:
    """The first scenes of the world, as latents and scribbles on the device that trains.

    Args:
        folder: keeps them from run to run, 0.3 MB each.
        count: how many.
        vae: encodes them.
        tokenizer: of the captions.
    """

    def __init__(self, folder: Path, count: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
        self.device = vae.device
        path = folder / f"clips-{count}-{_digest(vae)}.pt"
        if not path.exists():
            pairs = track(_encoded(vae, count), "drawing and encoding clips", total=count)
            latents, scribbles = zip(*pairs, strict=True)
            torch.save({"latents": torch.stack(latents), "scribbles": torch.stack(scribbles)}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        kept = torch.load(path, map_location=self.device, weights_only=True)
        self._latents = kept["latents"]  # [N, F, 4, h, w] float16
        self._scribbles = kept["scribbles"]  # [N, F, H, W] uint8
        scenes = [scene(seed) for seed in range(count)]
        self._motions = np.array([world.motion for world in scenes])
        captions = [*(world.caption for world in scenes), ""]
        tokens = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        self._tokens = tokens.to(self.device)

    def batch(
        self, seed: int, size: int, kind: str | None, frames: int = FRAMES, shares: Mapping[str, float] | None = None
    ) -> Batch:
        """Clips for one step.

        Args:
            seed: everything is drawn from it alone.
            size: how many.
            kind: of the keyframes.
            frames: all of a clip, or 1.
            shares: how often each motion comes; without them as often as in the world.
        """
        rng = np.random.default_rng(seed)
        count, slots = len(self._latents), 1 if frames == 1 else 3
        chosen = rng.integers(count, size=size) if shares is None else self._of_motions(rng, size, shares)
        first = rng.integers(FRAMES, size=size) if frames == 1 else np.zeros(size, int)
        places = np.stack([_places(rng, slots) if frames > 1 else np.zeros(1, int) for _ in range(size)])
        wanted = rng.random((size, slots)) < (0.7 if frames == 1 else 0.85)
        captions = np.where(rng.random(size) < WORDLESS, count, chosen)
        rows, which = self._index(chosen[:, None]), self._index(first[:, None] + np.arange(frames))
        latents = self._latents[rows, which].float()  # [B, F, 4, h, w]
        shown = self._index(first[:, None] + places)
        if kind == "rgb":
            keyframes = self._latents[rows, shown].float()
        else:
            keyframes = self._scribbles[rows, shown, None].expand(-1, -1, 3, -1, -1) / 255
        return Batch(
            latents.transpose(1, 2),
            self._tokens[self._index(captions)],
            kind,
            keyframes,
            self._index(places),
            self._index(wanted),
            rows[:, 0],
        )

    def scribbles(self, rows: Tensor) -> Tensor:
        """Of all frames of these clips [B]: [B, F, H, W] in 0..1."""
        return self._scribbles[rows] / 255

    def _of_motions(self, rng: np.random.Generator, size: int, shares: Mapping[str, float]) -> NDArray[np.int64]:
        known = {motion: share for motion, share in shares.items() if motion in self._motions}
        total = sum(known.values())
        drawn = rng.choice(list(known), size=size, p=[share / total for share in known.values()])
        return np.array([rng.choice(np.flatnonzero(self._motions == motion)) for motion in drawn])

    def _index(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _digest(vae: AutoencoderKL) -> str:
    """Of its weights: another autoencoder gives other latents."""
    digest = hashlib.sha256()
    for weight in vae.state_dict().values():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _places(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    return np.array(USUAL) if rng.random() < 0.5 else np.sort(rng.choice(FRAMES, count, replace=False))


def _drawn(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Frames [F, H, W, 3] and scribbles [F, H, W] of a scene."""
    world = scene(seed)
    return clip(world), np.stack([scribble(world, index) for index in range(FRAMES)])


@torch.no_grad()
def _encoded(vae: AutoencoderKL, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents [F, 4, h, w] float16 and scribbles [F, H, W] uint8 of the scenes of the first seeds."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context(method)) as processes:
        for frames, scribbles in processes.map(_drawn, range(count), chunksize=16):
            yield vae.encode(to_pixels(frames, vae.device)).latent_dist.mean.half().cpu(), torch.from_numpy(scribbles)
