"""Previews of a clip that is being made: one frame of it, as each step predicts it."""

import numpy as np
from numpy.typing import NDArray

COLOURS = np.array(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]], np.float32
)
"""Red, green and blue, from -1 to 1, for each channel of the latents of Stable Diffusion 1's VAE, by Keturn:
https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204"""


def previewed_frame(frames: int) -> int:
    """The frame that previews show: the middle one."""
    return frames // 2


def latent_colours(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The approximate colours of latents [4, H/8, W/8]: uint8 [H/8, W/8, 3]."""
    colours = np.einsum("chw,cr->hwr", latents, COLOURS)
    levels: NDArray[np.uint8] = ((colours + 1) * 127.5).clip(0, 255).round().astype(np.uint8)
    return levels
