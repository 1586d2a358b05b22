"""The graphs that compute a clip's conditioning: text encoder, VAE encoder, SparseCtrl."""

import numpy as np

from ..checked_request import CheckedRequest
from ..format.manifest import Manifest
from ..loop.conditioning import Conditioning, Residuals, frame_index, residual_inputs
from ..loop.prompt_embeds import encode_prompts
from ..loop.tokenizer import ClipTokenizer, TokenizedPrompt
from ..loop.windows import parts_of
from .sessions import Array, Sessions


def encode_prompt(sessions: Sessions, tokenizer: ClipTokenizer, prompts: list[TokenizedPrompt]) -> Array:
    """The embeddings of the prompts, float32 [B, 77*K, D], where K are the chunks of the longest prompt."""

    def encode(input_ids: Array, attention_mask: Array, clip_skip: int) -> Array:
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "clip_skip": np.array([clip_skip], np.int64)}
        (prompt_embeds,) = sessions.session("text_encoder").run(feeds)
        return prompt_embeds

    return encode_prompts(prompts, tokenizer([""]), encode)


def keyframe_feeds(sessions: Sessions, request: CheckedRequest) -> dict[str, Array]:
    """SparseCtrl's inputs that hold the keyframes.

    They are the distinct frames (each keyframe once, and a blank one), a mask that marks the keyframes among them, and
    for each frame of the clip the index of its distinct frame.

    `scribble` takes uint8 pixels [U, H, W, 3]; `rgb` the mode of the VAE's posterior, [U, 4, H/8, W/8].
    """
    pictures: Array = np.stack([item.pixels for item in request.keyframes])  # [K, H, W, 3]
    if request.controlnet == "rgb":
        encoder, parts = sessions.session("vae_encoder"), parts_of(len(pictures), request.keyframes_at_a_time)
        latents = [encoder.run({"image": pictures[part]})[0] for part in parts]
        encoded = np.empty((len(pictures), *latents[0].shape[1:]), latents[0].dtype)
        for part, values in zip(parts, latents, strict=True):
            encoded[part] = values
        pictures = encoded
    blank = len(pictures)
    conditioning = np.concatenate([pictures, np.zeros_like(pictures[:1])])
    mask = np.ones(blank + 1, np.float32)
    mask[blank] = 0
    return {"conditioning": conditioning, "conditioning_mask": mask, "frame_index": frame_index(request, blank)}


def residuals_at(
    sessions: Sessions, manifest: Manifest, request: CheckedRequest, conditioning: Conditioning, timestep: np.float32
) -> Residuals:
    """SparseCtrl's residuals at a timestep."""
    names = residual_inputs(manifest)
    inputs = {"timestep": np.array([timestep]), "prompt_embeds": conditioning.prompt_embeds, **conditioning.feeds}
    return dict(zip(names, sessions.session(f"controlnet_{request.controlnet}").run(inputs), strict=True))


def no_residuals(manifest: Manifest) -> Residuals:
    """The UNet's residuals at a step without control: zeros that broadcast."""
    return {name: np.zeros((1, int(shape[1]), 1, 1), np.float32) for name, shape in residual_inputs(manifest).items()}
