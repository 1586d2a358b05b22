"""Plan an export: the options, the sizes from the checkpoints' configurations, and one job per graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ..runtime.format.clip_layout import ClipLayout, ClipSize
from ..runtime.format.decoders import DECODERS
from ..runtime.format.manifest import MAX_SIDE, Dimension, SchedulerRecord, Sizes, TemporalNorm
from . import checkpoints, compatibility, configurations, graph_specs, published_models, traced_modules
from .check import ExportError
from .graph_specs import GraphSpec, Input
from .lora_files import read_lora
from .options import ExportOptions, public_name
from .original_formats import read_base
from .sources import is_file

__all__ = ["ExportOptions", "Job", "Parts", "lcm_schedule", "plan_jobs", "public_name", "read_parts"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The options, and what the checkpoints' configurations add to them: sizes, norms and schedule.

    `choices` has a line for each setting that follows from what a source is, instead of an option or its default.
    """

    options: ExportOptions
    choices: tuple[str, ...]
    temporal_norm: TemporalNorm
    sizes: Sizes
    scheduler: SchedulerRecord
    vocabulary: int
    max_tokens: int
    text_width: int
    text_layers: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def prompt(self) -> tuple[Dimension, ...]:
        """Shape of the prompt's embeddings."""
        return ("batch", "tokens", self.text_width)

    @property
    def residuals(self) -> list[tuple[Dimension, ...]]:
        """Shapes of SparseCtrl's residuals."""
        return graph_specs.residual_shapes(self.channels, self.layers)


def read_parts(options: ExportOptions) -> Parts:
    """Reads the configurations and checks that the parts fit together, before any long work starts.

    Raises:
        ExportError: a checkpoint cannot be read, or the parts do not fit together.
    """
    if is_file(options.base):
        read_base(options.base)  # before its settings are fetched
    unet = configurations.load_unet_config(options.base, options.loading)
    vae = configurations.load_vae_config(options.base, options.vae, options.loading)
    text = configurations.load_text_config(options.base, options.loading)
    compatibility.check_unet(options.base, unet, vae)
    motion = compatibility.check_motion_adapter(options.motion_adapter, unet)
    positions = [int(motion["motion_max_seq_length"])]
    positions += [compatibility.check_controlnet(kind, source, unet) for kind, source in options.controlnets.items()]
    max_frames = min(positions)
    if not 1 <= options.frames <= max_frames:
        raise ExportError("frames", f"{options.frames} is out of range", f"the motion modules allow 1 to {max_frames}")
    schedule = published_models.schedule(options.motion_adapter, motion) | options.scheduler
    for lora in options.loras:
        read_lora(lora)
    compatibility.check_embeddings(options.embeddings, options.base, int(text.hidden_size), options.loading)
    channels = tuple(unet["block_out_channels"])
    if options.tiny_decoder:
        compatibility.check_tiny_decoder(options.tiny_decoder, vae)
    return Parts(
        options=options,
        choices=tuple(published_models.choices(options, motion)),
        temporal_norm=options.temporal_norm or published_models.temporal_norm(motion),
        sizes=_sizes(options, unet, vae, max_frames),
        scheduler=lcm_schedule(configurations.load_lcm_config(options.base, schedule, options.loading)),
        vocabulary=int(text.vocab_size),
        max_tokens=int(text.max_position_embeddings),
        text_width=int(text.hidden_size),
        text_layers=int(text.num_hidden_layers),
        channels=channels,
        layers=compatibility.per_level(unet["layers_per_block"], unet),
    )


def _sizes(options: ExportOptions, unet: dict[str, Any], vae: dict[str, Any], max_frames: int) -> Sizes:
    """Returns the default and allowed sizes of requests."""
    factor = compatibility.scale_factor(vae)
    sample_size = unet["sample_size"] or 64
    rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    sizes = Sizes(
        height=rows * factor if options.height is None else max(1, options.height),
        width=columns * factor if options.width is None else max(1, options.width),
        frames=options.frames,
        max_frames=max_frames,
        multiple=factor,
        vae_scale_factor=factor,
        latent_channels=vae["latent_channels"],
    )
    for side in (sizes.height, sizes.width):
        if side % factor or not factor <= side <= MAX_SIDE:
            raise ExportError(
                "size",
                f"{sizes.width}x{sizes.height} is not allowed",
                f"give multiples of {factor} from {factor} to {MAX_SIDE}",
            )
    return sizes


@dataclass(frozen=True, slots=True)
class Job:
    """One graph to write.

    Attributes:
        spec: names, types and shapes of inputs and outputs.
        build: loads the module.
        traced: layout of the clip that the module is traced with. The graph is compared with torch at this layout.
        checked: layout of another clip at which the graph is also compared with torch.
    """

    spec: GraphSpec
    build: Callable[[], nn.Module]
    traced: ClipLayout
    checked: ClipLayout

    def trace_inputs(self) -> tuple[torch.Tensor, ...]:
        """Draws random inputs to trace the module with."""
        return self._inputs(self.traced, seed=0)

    def check_inputs(self) -> list[tuple[torch.Tensor, ...]]:
        """Draws random inputs for the comparison with torch, at the traced size and at the other one."""
        inputs = [self._inputs(self.traced, seed=1), self._inputs(self.checked, seed=2)]
        if self.spec.name == "unet":  # without keyframes the runtime passes zeros that broadcast
            broadcast = (
                torch.zeros(1, tensor.shape[1], 1, 1) if "residual" in item.name else tensor
                for item, tensor in zip(self.spec.inputs, inputs[-1], strict=True)
            )
            inputs.append(tuple(broadcast))
        return inputs

    def _inputs(self, layout: ClipLayout, seed: int) -> tuple[torch.Tensor, ...]:
        return self.spec.sample_inputs(layout.dimensions(self.spec.name), seed)


def plan_jobs(parts: Parts) -> list[Job]:
    """Returns the jobs of a bundle, in the order in which a request runs the graphs."""
    jobs = [_text_encoder(parts)]
    if "rgb" in parts.options.controlnets:
        jobs.append(_vae(parts, graph_specs.vae_encoder_spec, traced_modules.VaeEncoder))
    jobs += [_controlnet(parts, kind, source) for kind, source in parts.options.controlnets.items()]
    jobs += [_unet(parts), _lcm_update(parts), _vae(parts, graph_specs.vae_decoder_spec, traced_modules.VaeDecoder)]
    if parts.options.tiny_decoder:
        jobs.append(_tiny_decoder(parts, parts.options.tiny_decoder))
    return jobs


def _text_encoder(parts: Parts) -> Job:
    options = parts.options

    def build() -> nn.Module:
        return traced_modules.TextEncoder(
            checkpoints.load_text_encoder(options.base, list(options.loras), options.loading, options.embeddings)
        )

    spec = graph_specs.text_encoder_spec(parts.vocabulary, parts.max_tokens, parts.text_width, parts.text_layers)
    return Job(spec, build, *_video_layouts(parts))


def _video_layouts(parts: Parts) -> tuple[ClipLayout, ClipLayout]:
    """Returns two small clips: one to trace the graphs for prompts and latents, and one more to check them.

    The traced one can be halved at every level and has at least two latents at the last, since the tracer treats one
    as a constant. The checked one has odd sides at several levels, so that a graph that only takes the first kind of
    size is found.
    """
    factor = parts.sizes.vae_scale_factor
    side = factor * 2 ** (len(parts.channels) - 1)
    traced = ClipSize(width=3 * side, height=2 * side, frames=4)
    checked = ClipSize(width=13 * factor, height=9 * factor, frames=3)  # 9, 5, 3, 2 and 13, 7, 4, 2
    return (
        ClipLayout(parts.sizes, traced, prompts=2, keyframes=2, tokens=parts.max_tokens),
        ClipLayout(parts.sizes, checked, prompts=1, keyframes=1, tokens=2 * parts.max_tokens),
    )


def _controlnet(parts: Parts, kind: str, source: str) -> Job:
    sizes = parts.sizes
    factor = sizes.vae_scale_factor
    sides = ("latent_height", "latent_width")
    pixels = tuple(f"{side}*{factor}" for side in sides)
    conditioning = (
        Input("conditioning", ("distinct_frames", sizes.latent_channels, *sides), graph_specs.uniform)
        if kind == "rgb"
        else Input("conditioning", ("distinct_frames", *pixels, 3), graph_specs.integers(256, torch.uint8))
    )

    def build() -> nn.Module:
        model = checkpoints.load_controlnet(kind, source, parts.options.loading)
        return traced_modules.SparseCtrl(model, parts.temporal_norm)

    spec = graph_specs.controlnet_spec(kind, conditioning, parts.prompt, parts.residuals)
    return Job(spec, build, *_video_layouts(parts))


def _latents(parts: Parts) -> tuple[Dimension, ...]:
    return (1, parts.sizes.latent_channels, "frames", "latent_height", "latent_width")


def _unet(parts: Parts) -> Job:
    options = parts.options

    def build() -> nn.Module:
        model = checkpoints.load_unet(options.base, options.motion_adapter, list(options.loras), options.loading)
        return traced_modules.UNet(model, parts.temporal_norm)

    return Job(graph_specs.unet_spec(_latents(parts), parts.prompt, parts.residuals), build, *_video_layouts(parts))


def _lcm_update(parts: Parts) -> Job:
    scheduler = parts.scheduler

    def build() -> nn.Module:
        return traced_modules.LcmUpdate(scheduler.prediction_type, scheduler.clip_sample_range)

    return Job(graph_specs.lcm_update_spec(_latents(parts)), build, *_video_layouts(parts))


def _image_layouts(parts: Parts) -> tuple[ClipLayout, ClipLayout]:
    """Returns two small image sizes: one to trace the VAE, and one more to check it."""
    factor = parts.sizes.vae_scale_factor
    traced = ClipSize(width=6 * factor, height=4 * factor, frames=2)
    checked = ClipSize(width=3 * factor, height=5 * factor, frames=1)
    return (
        ClipLayout(parts.sizes, traced, keyframes=2, decoded=2),
        ClipLayout(parts.sizes, checked, keyframes=1, decoded=1),
    )


def _vae(parts: Parts, spec: Callable[[int, int], GraphSpec], module: Callable[..., nn.Module]) -> Job:
    options, sizes = parts.options, parts.sizes

    def build() -> nn.Module:
        return module(checkpoints.load_vae(options.base, options.vae, options.loading))

    return Job(spec(sizes.latent_channels, sizes.vae_scale_factor), build, *_image_layouts(parts))


def _tiny_decoder(parts: Parts, source: str) -> Job:
    sizes = parts.sizes

    def build() -> nn.Module:
        return traced_modules.TinyDecoder(checkpoints.load_tiny_decoder(source, parts.options.loading))

    spec = graph_specs.vae_decoder_spec(sizes.latent_channels, sizes.vae_scale_factor, DECODERS["tiny"])
    return Job(spec, build, *_image_layouts(parts))


def lcm_schedule(config: dict[str, Any]) -> SchedulerRecord:
    """Returns the manifest's record of an LCM scheduler's configuration.

    Raises:
        ExportError: the runtime does not support a setting.
    """
    for name in ("thresholding", "rescale_betas_zero_snr", "trained_betas"):
        if config.get(name):
            raise ExportError("scheduler", f"{name} is not supported")
    fields = {name: config[name] for name in SchedulerRecord.model_fields if name in config}
    if not config.get("clip_sample"):
        fields.pop("clip_sample_range", None)
    try:
        return SchedulerRecord.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        names = [str(name) for name in first["loc"]] or list(fields)
        reason = first["ctx"]["error"] if first["type"] == "value_error" else first["msg"]
        values = ", ".join(f"{name}={fields.get(name)!r}" for name in names)
        raise ExportError("scheduler", f"{values} is not supported: {reason}") from None
