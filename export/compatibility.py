"""Check from the configurations that the parts fit the base, before any long work starts."""

from collections.abc import Sequence
from typing import Any

from . import checkpoints, configurations
from .check import ExportError
from .embeddings import Embedding, read_vectors
from .loading import LoadOptions
from .sources import quoted


def per_level(value: int | list[int], config: dict[str, Any]) -> tuple[int, ...]:
    """Returns a setting for each level; a configuration may give one number for all levels."""
    return (value,) * len(config["block_out_channels"]) if isinstance(value, int) else tuple(value)


def check_unet(base: str, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """Checks that the UNet of `base` takes latents, timestep and prompt, and nothing else.

    Raises:
        ExportError: the UNet takes other latents than the VAE gives, or embeds the guidance scale.
    """
    if unet["in_channels"] != vae["latent_channels"]:
        raise ExportError(
            "base",
            f"{quoted(base)} takes {unet['in_channels']} channels (as inpainting models do), "
            f"but its VAE gives {vae['latent_channels']}",
            "use a text-to-image checkpoint",
        )
    if unet["time_cond_proj_dim"]:
        raise ExportError(
            "base",
            f"{quoted(base)} is distilled for LCM: time_cond_proj_dim is {unet['time_cond_proj_dim']}",
            "use the undistilled base, and pass the LCM-LoRA as a LoRA",
        )


def check_motion_adapter(source: str, unet: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the adapter.

    Raises:
        ExportError: the adapter is a PIA adapter, or its channels or layers differ from the base's.
    """
    adapter = configurations.load_motion_config(source)
    if adapter["conv_in_channels"]:
        raise ExportError(
            "motion_adapter", f"{quoted(source)} is a PIA adapter, which takes an image", "use an AnimateDiff adapter"
        )
    theirs = per_level(adapter["block_out_channels"], adapter), per_level(adapter["motion_layers_per_block"], adapter)
    ours = per_level(unet["block_out_channels"], unet), per_level(unet["layers_per_block"], unet)
    if theirs != ours:
        raise ExportError(
            "motion_adapter",
            f"{quoted(source)} does not fit the base: its channels and layers are {theirs}, the base's {ours}",
        )
    return adapter


def check_controlnet(kind: str, source: str, unet: dict[str, Any]) -> int:
    """Returns how many frames a SparseCtrl has positions for.

    Raises:
        ExportError: the SparseCtrl does not fit the base, is for another kind of keyframes, or pools its conditions.
    """
    config = configurations.load_controlnet_config(kind, source)
    if config["use_simplified_condition_embedding"] != (kind == "rgb"):
        other = "scribble" if kind == "rgb" else "rgb"
        raise ExportError(
            f"controlnet_{kind}", f"{quoted(source)} is a SparseCtrl for {other}", f"pass it as controlnet_{other}"
        )
    if config["global_pool_conditions"]:
        reason = f"{quoted(source)} pools its conditions globally, which is not supported"
        raise ExportError(f"controlnet_{kind}", reason)
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim"):
        theirs, ours = per_level(config[name], config), per_level(unet[name], unet)
        if theirs != ours:
            raise ExportError(
                f"controlnet_{kind}", f"{quoted(source)} does not fit the base: {name} is {theirs}, the base's {ours}"
            )
    return int(config["motion_max_seq_length"])


def check_embeddings(embeddings: Sequence[Embedding], base: str, width: int, options: LoadOptions) -> None:
    """Checks that textual inversions have the width of the text encoder of `base`, and tokens that are new to it.

    Raises:
        ExportError: a file is no textual inversion, a width differs, or a token exists already.
    """
    for item in embeddings:
        theirs = read_vectors(item).vectors.shape[1]
        if theirs != width:
            raise ExportError(
                "embedding",
                f"{quoted(item.source)} is for another model: its vectors have {theirs} values, the base's {width}",
                "give one for Stable Diffusion 1.5",
            )
    if embeddings:
        checkpoints.load_tokenizer(base, options, embeddings)


def scale_factor(vae: dict[str, Any]) -> int:
    """Returns the VAE's scale factor: the height and width of one latent, in pixels."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def check_tiny_decoder(source: str, vae: dict[str, Any]) -> None:
    """Checks that a decoder takes the latents of the VAE and gives RGB images of the same size.

    Raises:
        ExportError: the decoder's latent channels, scale factor or colour channels differ from the VAE's.
    """
    config = checkpoints.load_tiny_config(source)
    scale = config["upsampling_scaling_factor"] ** (len(config["num_decoder_blocks"]) - 1)
    theirs = config["latent_channels"], scale, config["out_channels"]
    ours = vae["latent_channels"], scale_factor(vae), 3
    if theirs != ours:
        raise ExportError(
            "tiny_decoder",
            f"{quoted(source)} does not fit the base: its latent channels, scale and colours are {theirs}, "
            f"the VAE's {ours}",
        )
