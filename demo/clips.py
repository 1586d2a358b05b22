"""Clips for training. The autoencoder encodes them once; keyframes are chosen for each batch."""

import hashlib
import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil
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
from world import FRAMES, KEYFRAMES, SIZE, Scene, scene

SHARES = {"moves": 0.14, "turns": 0.12, "grows": 0.05, "shrinks": 0.05, "changes": 0.3, "crosses": 0.34}
"""Share of clips with each motion. Hard motions are more frequent than in the world."""
WORDLESS = 0.1
"""Share of clips without a caption, which guidance needs as its unconditional case."""
AHEAD = 256
"""Number of clips that are drawn while others are encoded, 1 MB each."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of B clips of F frames.

    Attributes:
        latents: [B, 4, F, h, w], scaled.
        tokens: of the captions, [B, 77] int64.
        kind: of the keyframes, or None.
        keyframes: K pictures for each clip, scribbles [B, K, 3, H, W] in 0..1 or latents [B, K, 4, h, w].
        places: the frames of the keyframes, [B, K] int64.
        wanted: whether each keyframe is given, [B, K] bool.
        shown: indexes of the F frames in their clip, [F] int64; None means its first frames.
        rows: indexes of the clips in `Clips`, [B] int64, if they come from there.
    """

    latents: Tensor
    tokens: Tensor
    kind: str | None
    keyframes: Tensor
    places: Tensor
    wanted: Tensor
    shown: Tensor | None = None
    rows: Tensor | None = None


class Clips:
    """The first scenes that give each motion its share, as latents and scribbles on the training device.

    Args:
        folder: caches them, 0.3 MB each.
        count: number of clips.
        vae: encodes them.
        tokenizer: of the captions.
    """

    def __init__(self, folder: Path, count: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
        self.device = vae.device
        scenes = _scenes(count)
        seeds = list(scenes)
        path = folder / f"clips-{_digest(vae, seeds)}.pt"
        if not path.exists():
            latents = torch.empty(count, FRAMES, 4, SIZE // 8, SIZE // 8, dtype=torch.float16)
            scribbles = torch.empty(count, FRAMES, SIZE, SIZE, dtype=torch.uint8)
            pairs = track(_encoded(vae, seeds), "drawing and encoding clips", total=count)
            for row, pair in enumerate(pairs):
                latents[row], scribbles[row] = pair
            torch.save({"latents": latents, "scribbles": scribbles}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            del latents, scribbles
        kept = torch.load(path, map_location=self.device, weights_only=True)
        self._latents = kept["latents"]  # [N, F, 4, h, w] float16
        self._scribbles = kept["scribbles"]  # [N, F, H, W] uint8
        self._motions = np.array([world.motion for world in scenes.values()])
        captions = [*(world.caption for world in scenes.values()), ""]
        tokens = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        self._tokens = tokens.to(self.device)

    def batch(
        self, seed: int, size: int, kind: str | None, frames: int = FRAMES, motions: Sequence[str] | None = None
    ) -> Batch:
        """Returns clips for one step.

        Args:
            seed: determines the whole batch.
            size: number of clips.
            kind: of the keyframes.
            frames: number of frames of each clip, all or fewer; keyframes are taken first.
            motions: allowed motions; all by default.

        Raises:
            ValueError: no clip has one of the motions.
        """
        rng = np.random.default_rng(seed)
        count = len(self._latents)
        these = np.arange(count) if motions is None else np.flatnonzero(np.isin(self._motions, motions))
        if not len(these):
            raise ValueError(f"no clip has a motion of {motions}")
        chosen = rng.choice(these, size=size)
        shown, places = _frames(rng, frames)
        wanted = rng.random((size, len(places))) < (0.7 if frames == 1 else 0.85)
        captions = np.where(rng.random(size) < WORDLESS, count, chosen)
        rows = self._index(chosen)
        latents = self._latents[rows[:, None], self._index(shown)].float()  # [B, F, 4, h, w]
        if kind == "rgb":
            keyframes = latents[:, self._index(places)]
        else:
            keyframes = self._scribbles[rows[:, None], self._index(shown[places])]
            keyframes = keyframes[:, :, None].expand(-1, -1, 3, -1, -1) / 255
        return Batch(
            latents.transpose(1, 2),
            self._tokens[self._index(captions)],
            kind,
            keyframes,
            self._index(places).expand(size, -1),
            self._index(wanted),
            self._index(shown),
            rows,
        )

    def scribbles(self, part: Batch) -> Tensor:
        """Returns the scribbles of all frames of a batch, [B, F, H, W] in 0..1."""
        return self._scribbles[part.rows[:, None], part.shown] / 255  # type: ignore[index]

    def _index(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _scenes(count: int) -> dict[int, Scene]:
    """Returns the first scenes that give each motion its share, by seed."""
    left = {motion: ceil(share * count) for motion, share in SHARES.items()}
    scenes: dict[int, Scene] = {}
    for seed in itertools.count():
        if len(scenes) == count:
            return scenes
        world = scene(seed)
        if left[world.motion]:
            left[world.motion] -= 1
            scenes[seed] = world
    raise AssertionError


def _digest(vae: AutoencoderKL, seeds: list[int]) -> str:
    """Hashes what the latents depend on: weights, scenes, and the code that draws them."""
    digest = hashlib.sha256(np.array(seeds).tobytes())
    for name in ("world.py", "drawing.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    for weight in vae.state_dict().values():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _frames(rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Picks frames of a clip, in order, and the places of keyframes among them: up to three, taken before others."""
    slots = min(count, len(KEYFRAMES))
    usual = slots == len(KEYFRAMES) and rng.random() < 0.5
    keyframes = np.array(KEYFRAMES) if usual else rng.choice(FRAMES, slots, replace=False)
    others = np.setdiff1d(np.arange(FRAMES), keyframes)
    shown = np.sort(np.concatenate([keyframes, rng.choice(others, count - slots, replace=False)]))
    return shown, np.searchsorted(shown, np.sort(keyframes))


def _drawn(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draws frames [F, H, W, 3] and scribbles [F, H, W] of a scene."""
    world = scene(seed)
    return clip(world), np.stack([scribble(world, index) for index in range(FRAMES)])


@torch.no_grad()
def _encoded(vae: AutoencoderKL, seeds: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields latents [F, 4, h, w] float16 and scribbles [F, H, W] uint8 of each scene."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context(method)) as processes:
        groups = (seeds[first : first + AHEAD] for first in range(0, len(seeds), AHEAD))
        drawn = (processes.map(_drawn, group, chunksize=16) for group in groups)
        for frames, scribbles in itertools.chain.from_iterable(drawn):
            yield vae.encode(to_pixels(frames, vae.device)).latent_dist.mean.half().cpu(), torch.from_numpy(scribbles)
