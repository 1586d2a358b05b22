"""Inputs and outputs of each graph: names, types and shapes, and random inputs to trace and check it with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..runtime.format.decoders import DECODERS
from ..runtime.format.manifest import Dimension, TensorRecord, resolve_shape

Sample = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draws standard normal values."""
    return torch.randn(shape, generator=generator)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draws values in 0.05..1, so that dividing by them is safe."""
    return 0.05 + 0.95 * torch.rand(shape, generator=generator)


def integers(limit: int, dtype: torch.dtype = torch.int64) -> Sample:
    """Returns a function that draws whole numbers in 0..limit-1."""
    return lambda shape, generator: torch.randint(limit, shape, generator=generator).to(dtype)


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a graph; symbolic dimensions are written as in `TensorRecord`."""

    name: str
    shape: tuple[Dimension, ...]
    sample: Sample = normal


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """A graph's inputs, and the names and shapes of its outputs.

    The inputs from index `variadic` on are variadic arguments (`*args`) of the traced module.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, tuple[Dimension, ...]], ...]
    variadic: int | None = None

    def sample_inputs(self, sizes: dict[str, int], seed: int) -> tuple[torch.Tensor, ...]:
        """Draws random inputs for the given sizes of the symbolic dimensions."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(item.sample(resolve_shape(item.shape, sizes), generator) for item in self.inputs)


def text_encoder_spec(vocabulary: int, max_tokens: int, width: int, layers: int) -> GraphSpec:
    """Token ids, the tokens that may be seen, and the last layers to skip -> embeddings of the prompt."""
    return GraphSpec(
        "text_encoder",
        (
            Input("input_ids", ("batch", max_tokens), integers(vocabulary)),
            Input("attention_mask", ("batch", max_tokens), _attention_mask),
            Input("clip_skip", (1,), integers(layers)),
        ),
        (("prompt_embeds", ("batch", max_tokens, width)),),
    )


def residual_shapes(channels: tuple[int, ...], layers: tuple[int, ...]) -> list[tuple[Dimension, ...]]:
    """Returns the shapes of SparseCtrl's residuals: of conv_in, each layer and downsampler, and the middle block."""
    levels = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        levels += [(width, level)] * count
        if level < len(channels) - 1:
            levels.append((width, level + 1))
    levels.append((channels[-1], len(channels) - 1))

    def side(name: str, level: int) -> str:
        return f"{name}/{2**level}" if level else name

    return [
        ("batch*frames", width, side("latent_height", level), side("latent_width", level)) for width, level in levels
    ]


def residual_names(count: int) -> list[str]:
    """Returns the names of the residuals, in the order of `residual_shapes`."""
    return [f"down_residual_{index}" for index in range(count - 1)] + ["mid_residual"]


def controlnet_spec(
    kind: str,
    conditioning: Input,
    prompt: tuple[Dimension, ...],
    residuals: list[tuple[Dimension, ...]],
) -> GraphSpec:
    """Keyframes, timestep and prompt -> residuals."""
    return GraphSpec(
        f"controlnet_{kind}",
        (
            Input("timestep", (1,), _timestep),
            Input("prompt_embeds", prompt),
            conditioning,
            Input("conditioning_mask", ("distinct_frames",), lambda shape, _: torch.arange(shape[0]).clamp(max=1.0)),
            Input("frame_index", ("frames",), lambda shape, _: torch.arange(shape[0]) % 2),
        ),
        tuple(zip(residual_names(len(residuals)), residuals, strict=True)),
    )


def unet_spec(
    latents: tuple[Dimension, ...],
    prompt: tuple[Dimension, ...],
    residuals: list[tuple[Dimension, ...]],
) -> GraphSpec:
    """Latents, timestep, prompt, residuals and their scale -> prediction of one step."""
    inputs = (
        Input("latents", latents),
        Input("timestep", (1,), _timestep),
        Input("prompt_embeds", prompt),
        Input("conditioning_scale", (1,), uniform),
    )
    named = zip(residual_names(len(residuals)), residuals, strict=True)
    return GraphSpec(
        "unet",
        inputs + tuple(Input(name, shape) for name, shape in named),
        (("prediction", ("batch", *latents[1:])),),
        variadic=len(inputs),
    )


def lcm_update_spec(latents: tuple[Dimension, ...]) -> GraphSpec:
    """Predictions -> the next latents, and the denoised estimate frame by frame."""
    _, channels, frames, *sides = latents
    return GraphSpec(
        "lcm_update",
        (
            Input("latents", latents),
            Input("negative", latents),
            Input("positive", latents),
            Input("guidance_scale", (1,), uniform),
            Input("noise", latents),
            Input("coefficients", (6,), uniform),
        ),
        (("next_latents", latents), ("images", (frames, channels, *sides))),
    )


def motion_module_spec(blocks: list[tuple[str, int]]) -> GraphSpec:
    """Every temporal transformer on its own: each block has one input and one output, named after the block."""
    shapes: list[tuple[str, tuple[Dimension, ...]]] = [
        (name, ("frames", channels, f"height_{index}", f"width_{index}"))
        for index, (name, channels) in enumerate(blocks)
    ]
    return GraphSpec(
        "motion_module",
        tuple(Input(f"{name}.input", shape) for name, shape in shapes),
        tuple((f"{name}.output", shape) for name, shape in shapes),
        variadic=0,
    )


def vae_encoder_spec(latent_channels: int, factor: int) -> GraphSpec:
    """Images -> latents."""
    return GraphSpec(
        "vae_encoder",
        (Input("image", ("images", "height", "width", 3), integers(256, torch.uint8)),),
        (("latents", ("images", latent_channels, f"height/{factor}", f"width/{factor}")),),
    )


def vae_decoder_spec(latent_channels: int, factor: int, name: str = DECODERS["full"]) -> GraphSpec:
    """Latents -> frames."""
    return GraphSpec(
        name,
        (Input("latents", ("images", latent_channels, "latent_height", "latent_width")),),
        (("frames", ("images", f"latent_height*{factor}", f"latent_width*{factor}", 3)),),
    )


def tensor_records(
    names_and_shapes: list[tuple[str, tuple[Dimension, ...]]], tensors: tuple[torch.Tensor, ...]
) -> tuple[TensorRecord, ...]:
    """Returns the manifest's records of inputs or outputs, with the types of `tensors`."""
    return tuple(
        TensorRecord(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape)
        for (name, shape), tensor in zip(names_and_shapes, tensors, strict=True)
    )


def _attention_mask(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draws zeros and ones; the first token is always seen, as it has no other to look at."""
    mask = torch.randint(2, shape, generator=generator)
    mask[:, 0] = 1
    return mask


def _timestep(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(1, 1000, shape, generator=generator).float()
