"""The networks of the demo model: small instances of the standard classes of diffusers and transformers."""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    MotionAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from sparsectrl_lcm.benchmarks.random_checkpoints import write_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel
from world import SIZE, WORDS

VAE_CHANNELS = (8, 16, 32, 48)
TINY_CHANNELS = 16
CHANNELS = (32, 48, 64)
TEXT_WIDTH = 64
HEADS = 4
LATENT_SIZE = SIZE // 8
KINDS = ("scribble", "rgb")


def to_pixels(frames: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Converts frames [N, H, W, 3] to the autoencoder's input, [N, 3, H, W] in -1..1."""
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_vae() -> AutoencoderKL:
    """The autoencoder: 128x128 pixels to 16x16 latents of four channels."""
    return AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def make_tiny() -> AutoencoderTiny:
    """A decoder with a sixth of the work, in TAESD's architecture; its encoder is not used."""
    channels = (TINY_CHANNELS,) * len(VAE_CHANNELS)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1,) * len(channels),
        num_decoder_blocks=(1,) * len(channels),
    )


def make_text_encoder(folder: Path) -> CLIPTextModel:
    """The text encoder; writes its tokenizer, with the words of captions, into a folder."""
    vocabulary = write_tokenizer(folder, list(WORDS))
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def make_spatial_unet() -> UNet2DConditionModel:
    """The UNet without motion."""
    levels = len(CHANNELS)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=8,
    )


def make_motion_adapter() -> MotionAdapter:
    """The motion modules of the UNet."""
    return MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=HEADS,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
    )


def make_controlnet(kind: str) -> SparseControlNetModel:
    """SparseCtrl for scribbles (pixels) or pictures (latents)."""
    levels = len(CHANNELS)
    return SparseControlNetModel(
        conditioning_channels=3 if kind == "scribble" else 4,
        down_block_types=("CrossAttnDownBlockMotion",) * (levels - 1) + ("DownBlockMotion",),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=8,
        motion_num_attention_heads=HEADS,
        conditioning_embedding_out_channels=(8, 16, 24, 32),
        use_simplified_condition_embedding=kind == "rgb",
    )


def make_schedule() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion in the form of the runtime's LCM schedule: linear betas, v-prediction.

    Predicting v keeps the first of few steps stable, when noise hides everything (Salimans and Ho 2022,
    arXiv:2202.00512).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
    )
