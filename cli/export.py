"""`sparsectrl-lcm export`. Its subcommands are in `swaps.py`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import InvalidRequest, SparseCtrlLcmError
from .app import App


class TemporalNorm(StrEnum):
    """What group norms take their statistics over; see the manifest's `TemporalNorm`."""

    frame = "frame"
    clip = "clip"
    resnet_clip = "resnet-clip"


Variant = Annotated[str | None, typer.Option(metavar="NAME", help="Which weights of a folder to take, such as fp16.")]

app = App(help="Turn checkpoints into a bundle of ONNX graphs.")


@app.callback()
def export(
    context: typer.Context,
    base: Annotated[str | None, typer.Option(metavar="DIR|HUB|FILE", help="Stable Diffusion 1.5; required.")] = None,
    motion_adapter: Annotated[
        str | None, typer.Option(metavar="DIR|HUB|FILE", help="AnimateDiff's motion modules; required.")
    ] = None,
    controlnet_scribble: Annotated[
        str | None, typer.Option(metavar="DIR|HUB|FILE", help="SparseCtrl for scribbles.")
    ] = None,
    controlnet_rgb: Annotated[str | None, typer.Option(metavar="DIR|HUB|FILE", help="SparseCtrl for pictures.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH|HUB[=WEIGHT]", help="A LoRA to fuse, such as the LCM-LoRA; repeatable."),
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|HUB[=TOKEN]", help="A textual inversion, and the token it gets in prompts; repeatable."
        ),
    ] = None,
    vae: Annotated[str | None, typer.Option(metavar="DIR|HUB|FILE", help="Another VAE; the base's by default.")] = None,
    tiny_decoder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|HUB|FILE",
            help="A small decoder beside the VAE's: an AutoencoderTiny, or a file in TAESD's format.",
        ),
    ] = None,
    temporal_norm: Annotated[
        TemporalNorm | None,
        typer.Option(
            help="Statistics of group norms: frame (AnimateDiff v2, v3), resnet-clip (v1) or clip (as diffusers); "
            "by default as the motion modules were trained."
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(help="Frames if a request names none, up to the positions of the motion modules.")
    ] = 16,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Size in pixels if a request names none; the base's by default."),
    ] = None,
    scheduler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Overrides the LCM schedule, such as beta_schedule=scaled_linear; repeatable."
        ),
    ] = None,
    base_config: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|HUB", help="For a base in one file: where its tokenizer and settings come from; SD 1.5's."
        ),
    ] = None,
    variant: Variant = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all sources, say what they are, write nothing.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new or empty folder; required.")] = None,
) -> None:
    """Turn checkpoints into a bundle of ONNX graphs, each checked against torch."""
    if context.invoked_subcommand is not None:
        return
    required = {"--base": base, "--motion-adapter": motion_adapter, "--output": output or dry_run or None}
    if missing := [name for name, value in required.items() if value is None]:
        *others, last = missing
        names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
        raise InvalidRequest("export", f"{names} missing", "see `sparsectrl-lcm export --help`")
    assert base is not None
    assert motion_adapter is not None
    need_export_extra()
    from ..export.dry_run import dry_run as describe_export
    from ..export.embeddings import Embedding
    from ..export.exporter import export_bundle
    from ..export.loading import BASE_CONFIG
    from ..export.lora_files import Lora
    from ..export.plan import ExportOptions
    from ..runtime.operating_system import quote_argument
    from .build import build_export_engines
    from .options import parse_size
    from .progress_bar import Bar

    width, height = parse_size(size)
    controlnets = {"scribble": controlnet_scribble, "rgb": controlnet_rgb}
    options = ExportOptions(
        base=base,
        motion_adapter=motion_adapter,
        controlnets={kind: source for kind, source in controlnets.items() if source is not None},
        loras=tuple(Lora.parse(text) for text in lora or ()),
        embeddings=tuple(Embedding.parse(text) for text in embedding or ()),
        vae=vae,
        tiny_decoder=tiny_decoder,
        temporal_norm=None if temporal_norm is None else temporal_norm.value,
        frames=frames,
        height=height,
        width=width,
        scheduler=dict(_override(text) for text in scheduler or ()),
        base_config=base_config or BASE_CONFIG,
        variant=variant,
    )
    if dry_run:
        for line in describe_export(options):
            typer.echo(line)
        return
    assert output is not None
    with Bar() as bar:
        manifest = export_bundle(
            options,
            output,
            lambda name, index, count: bar.update(f"{name} ({min(index + 1, count)}/{count})", index / count),
            typer.echo,
        )
    for name, record in manifest.graphs.items():
        unit = "levels" if record.outputs[0].dtype == "uint8" else "relative"
        typer.echo(f"{name}: largest error {record.max_error:.1e} ({unit})")
    build_export_engines(output)
    total = sum(record.bytes for record in manifest.files.values())
    command = f"sparsectrl-lcm generate --bundle {quote_argument(str(output))} --prompt ... -o clip.mp4"
    typer.echo(f"{output}: {total / 1e6:.1f} MB; try `{command}`")


def need_export_extra() -> None:
    """Raises SparseCtrlLcmError if the export extra is not installed; silences the libraries' warnings."""
    import os
    from importlib.util import find_spec

    if missing := [
        name for name in ("torch", "diffusers", "transformers", "onnxscript", "peft") if not find_spec(name)
    ]:
        raise SparseCtrlLcmError(
            "export", f"{', '.join(missing)} not installed", "run: pip install 'sparsectrl-lcm[export]'"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _override(text: str) -> tuple[str, str | int | float]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise InvalidRequest(
            "scheduler", f"{text!r} is not allowed", "give NAME=VALUE, such as beta_schedule=scaled_linear"
        )
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for convert in (int, float):
        try:
            return name, convert(value)
        except ValueError:
            continue
    return name, value
