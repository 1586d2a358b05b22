"""Random checkpoints in the diffusers format: the architecture of Stable Diffusion 1.5 and AnimateDiff at any size.

They replace the public weights in tests and, at full size, in benchmarks. No weight is zero: SparseCtrl's
zero-initialised convolutions would otherwise hide the whole network.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    MotionAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a checkpoint; the defaults are small."""

    channels: tuple[int, ...] = (32, 64, 64, 64)
    layers: int = 1
    heads: int | tuple[int, ...] = 4
    motion_heads: int = 4
    groups: int = 8
    text_width: int = 48
    text_layers: int = 2
    text_heads: int = 4
    vocabulary: int = 0
    vae_channels: tuple[int, ...] = (16, 16, 32, 32)
    vae_layers: int = 1
    vae_groups: int = 8
    tiny_channels: int = 16
    tiny_layers: int = 1
    motion_mid_block: bool = False
    linear_projection: bool = False
    sample_size: int = 16
    control_channels: tuple[int, ...] = (8, 8, 16, 24)
    channel_order: str = "rgb"


FULL_SIZE = Architecture(
    channels=(320, 640, 1280, 1280),
    layers=2,
    heads=8,
    motion_heads=8,
    groups=32,
    text_width=768,
    text_layers=12,
    text_heads=12,
    vocabulary=49408,
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    vae_groups=32,
    tiny_channels=64,
    tiny_layers=3,
    sample_size=64,
    control_channels=(16, 32, 96, 256),
)
"""Stable Diffusion 1.5, AnimateDiff v3 and its SparseCtrl, TAESD."""


def write_checkpoints(folder: Path, arch: Architecture, seed: int = 0) -> dict[str, Path]:
    """Writes base, motion adapter, both SparseCtrls and a tiny decoder; returns their folders by name."""
    return {
        "base": write_base(folder / "base", arch, seed),
        "motion_adapter": write_motion_adapter(folder / "motion_adapter", arch, seed + 10),
        "scribble": write_controlnet(folder / "scribble", arch, "scribble", seed + 20),
        "rgb": write_controlnet(folder / "rgb", arch, "rgb", seed + 30),
        "tiny_decoder": write_tiny_decoder(folder / "tiny_decoder", arch, seed + 40),
    }


GAINS = {"controlnet_cond_embedding": 1.8, "motion_modules": 1.3}
"""Factors on random weights. Without them a keyframe's effect would fade before it reaches the other frames."""


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Fills every parameter with values that are never zero and keep activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            values = torch.where(values.abs() < 1e-2, 1e-2, values)
            if parameter.ndim > 1 and "embedding.weight" not in name:
                values *= prod(gain for part, gain in GAINS.items() if part in name) / parameter[0].numel() ** 0.5
            elif name.endswith("weight") and parameter.ndim == 1:
                values = 1 + 0.2 * values
            else:
                values *= 0.1
            parameter.copy_(values)
    return module.eval()


# fmt: off
WORDS = [
    "a", "an", "the", "of", "in", "on", "and", "with", "red", "green", "blue", "yellow", "white", "black",
    "small", "large", "round", "circle", "square", "triangle", "star", "moves", "turns", "grows", "left", "right",
    "up", "down", "over", "plain", "sky", "sea", "snow", "night", "day", "slowly", "quickly", "photo",
    "drawing", "lighthouse",
]
# fmt: on


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> int:
    """Writes a CLIP tokenizer (vocab.json, merges.txt) with a token for each word. Returns the vocabulary's size."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts[:2] = ["".join(pair)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


def write_base(folder: Path, arch: Architecture, seed: int) -> Path:
    """Writes a Stable Diffusion base: tokenizer, text encoder, UNet, VAE and scheduler."""
    vocabulary = write_tokenizer(folder / "tokenizer")
    randomize(text_encoder(arch, vocabulary), seed).save_pretrained(folder / "text_encoder")
    randomize(unet(arch), seed + 1).save_pretrained(folder / "unet")
    write_vae(folder / "vae", arch, seed + 2)
    scheduler().save_config(folder / "scheduler")
    write_index(folder)
    return folder


def text_encoder(arch: Architecture, vocabulary: int) -> CLIPTextModel:
    """The text encoder for a tokenizer with `vocabulary` tokens, with torch's default weights."""
    config = CLIPTextConfig(
        vocab_size=max(vocabulary, arch.vocabulary),
        hidden_size=arch.text_width,
        intermediate_size=4 * arch.text_width,
        num_hidden_layers=arch.text_layers,
        num_attention_heads=arch.text_heads,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def unet(arch: Architecture) -> UNet2DConditionModel:
    """The UNet without motion modules, with torch's default weights."""
    levels = len(arch.channels)
    return UNet2DConditionModel(
        sample_size=arch.sample_size,
        block_out_channels=arch.channels,
        layers_per_block=arch.layers,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=arch.text_width,
        attention_head_dim=arch.heads,
        norm_num_groups=arch.groups,
        use_linear_projection=arch.linear_projection,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def write_index(folder: Path) -> None:
    """Writes model_index.json, which makes a folder of parts a Stable Diffusion checkpoint."""
    classes = {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(classes))


def write_vae(folder: Path, arch: Architecture, seed: int) -> Path:
    """Writes an AutoencoderKL."""
    randomize(vae(arch), seed).save_pretrained(folder)
    return folder


def vae(arch: Architecture) -> AutoencoderKL:
    """The AutoencoderKL, with torch's default weights."""
    levels = len(arch.vae_channels)
    return AutoencoderKL(
        block_out_channels=arch.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=arch.vae_groups,
        layers_per_block=arch.vae_layers,
        scaling_factor=0.18215,
    )


def write_tiny_decoder(folder: Path, arch: Architecture, seed: int) -> Path:
    """Writes an AutoencoderTiny with as many levels as the VAE."""
    channels = (arch.tiny_channels,) * len(arch.vae_channels)
    layers = (arch.tiny_layers,) * (len(channels) - 1)
    model = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, *layers),
        num_decoder_blocks=(*layers, 1),
    )
    randomize(model, seed)
    _spread_colours(model, seed)
    model.save_pretrained(folder)
    return folder


def _spread_colours(model: AutoencoderTiny, seed: int) -> None:
    """Scales the last convolution so that colours spread around grey. Otherwise most would be clipped.

    The latents from a random UNet have a standard deviation of about 30.
    """
    latents = torch.randn(2, model.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    last = model.decoder.layers[-1]
    with torch.no_grad():
        colours = model.decoder(30 * latents) / 2 + 0.5
        gain = 0.2 / colours.std((0, 2, 3))
        last.weight *= gain[:, None, None, None]
        last.bias.copy_(0.5 + gain * (last.bias - colours.mean((0, 2, 3))))


def write_motion_adapter(folder: Path, arch: Architecture, seed: int) -> Path:
    """Writes the motion modules of the UNet."""
    randomize(motion_adapter(arch), seed).save_pretrained(folder)
    return folder


def motion_adapter(arch: Architecture) -> MotionAdapter:
    """The motion modules of the UNet, with torch's default weights."""
    return MotionAdapter(
        block_out_channels=arch.channels,
        motion_layers_per_block=arch.layers,
        motion_num_attention_heads=arch.motion_heads,
        motion_norm_num_groups=arch.groups,
        use_motion_mid_block=arch.motion_mid_block,
    )


def write_controlnet(folder: Path, arch: Architecture, kind: str, seed: int) -> Path:
    """Writes a SparseCtrl for `scribble` (pixels) or `rgb` (latents) keyframes."""
    randomize(controlnet(arch, kind), seed).save_pretrained(folder)
    return folder


def controlnet(arch: Architecture, kind: str) -> SparseControlNetModel:
    """The SparseCtrl for `scribble` or `rgb`, with torch's default weights."""
    levels = len(arch.channels)
    return SparseControlNetModel(
        conditioning_channels=3 if kind == "scribble" else 4,
        down_block_types=("CrossAttnDownBlockMotion",) * (levels - 1) + ("DownBlockMotion",),
        block_out_channels=arch.channels,
        layers_per_block=arch.layers,
        cross_attention_dim=arch.text_width,
        attention_head_dim=arch.heads,
        norm_num_groups=arch.groups,
        motion_num_attention_heads=arch.motion_heads,
        use_linear_projection=arch.linear_projection,
        conditioning_embedding_out_channels=arch.control_channels,
        use_simplified_condition_embedding=kind == "rgb",
        controlnet_conditioning_channel_order=arch.channel_order if kind == "scribble" else "rgb",
    )
