"""Weights in the layouts in which their authors published them, written from state dicts of diffusers' models."""

import re

import torch

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def animatediff(state: Tensors, prefix: str = "", positions: bool = True) -> Tensors:
    """Motion modules, or a SparseCtrl that contains some, as guoyww/AnimateDiff names them."""
    written: Tensors = {}
    for name, value in state.items():
        head, part, tail = name.partition("motion_modules.")
        if not part:
            written[prefix + name] = value
            continue
        number, _, rest = tail.partition(".")
        stem = f"{prefix}{head}{part}{number}.temporal_transformer."
        if rest.endswith("pos_embed.pe"):
            block = rest.removesuffix("pos_embed.pe")
            for attention in (0, 1) if positions else ():
                written[f"{stem}{block}attention_blocks.{attention}.pos_encoder.pe"] = value.clone()
            continue
        for ours, theirs in ((".norm1.", ".norms.0."), (".norm2.", ".norms.1."), (".norm3.", ".ff_norm.")):
            rest = rest.replace(ours, theirs)
        rest = rest.replace(".attn1.", ".attention_blocks.0.").replace(".attn2.", ".attention_blocks.1.")
        written[stem + rest] = value
    return written


def ldm_unet(state: Tensors, layers: int) -> Tensors:
    """A UNet as CompVis' latent diffusion names it."""
    return {f"model.diffusion_model.{_unet_name(name, layers, state)}": value for name, value in state.items()}


def _unet_name(name: str, layers: int, state: Tensors) -> str:
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = match.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{_resnet(rest)}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert match, name
    side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        crossing = any(key.startswith(f"up_blocks.{level}.attentions.") for key in state)
        return f"output_blocks.{(layers + 1) * level + layers}.{2 if crossing else 1}.{rest}"
    place = (layers + 1) * level + layer
    block = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
    return f"{block}.0.{_resnet(rest)}" if kind == "resnets" else f"{block}.1.{rest}"


def _resnet(rest: str) -> str:
    part, _, tail = rest.partition(".")
    return f"{RESNET[part]}.{tail}" if part in RESNET else rest


def ldm_vae(state: Tensors, levels: int) -> Tensors:
    """A VAE as CompVis' latent diffusion names it, whose attention is made of convolutions."""
    written: Tensors = {}
    for name, value in state.items():
        key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", key)
        key = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in key:
            for ours, theirs in VAE_ATTENTION.items():
                key = key.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
            key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
        convolution = value.ndim == 2
        written[f"first_stage_model.{key}"] = value[:, :, None, None] if convolution else value
    return written


def ldm_text(state: Tensors) -> Tensors:
    """A CLIP text encoder in a checkpoint of Stable Diffusion."""
    prefix = "cond_stage_model.transformer.text_model."
    return {prefix + name.removeprefix("text_model."): value for name, value in state.items()}
