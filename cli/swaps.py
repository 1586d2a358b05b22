"""`sparsectrl-lcm export motion-module`, `export lora` and `export controlnet`: other weights for a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import InvalidRequest
from .export import TemporalNorm, Variant, need_export_extra

if TYPE_CHECKING:
    from ..runtime.format.manifest import Manifest

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write a new bundle to this folder; without it, BUNDLE changes.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what changes, write nothing.")]
Bundle = Annotated[Path, typer.Argument(help="A folder from `export`.")]


def motion_module(
    motion_adapter: Annotated[str, typer.Option(metavar="DIR|HUB|FILE", help="The new motion modules.")],
    bundle: Annotated[Path | None, typer.Argument(help="A folder from `export`.")] = None,
    standalone: Annotated[
        Path | None, typer.Option(help="Write the motion modules to this file, as their own ONNX graph.")
    ] = None,
    temporal_norm: Annotated[
        TemporalNorm, typer.Option(help="For --standalone: frame (as trained) or clip (as diffusers).")
    ] = TemporalNorm.frame,
    dry_run: DryRun = False,
    output: Output = None,
) -> None:
    """Replace a bundle's motion module, or write one as its own ONNX graph.

    This also replaces motion LoRAs that were fused at export.
    """
    if bundle is None and standalone is None:
        raise InvalidRequest("export motion-module", "nothing to write", "give BUNDLE, --standalone or both")
    if bundle is None and output is not None:
        raise InvalidRequest("output", "there is no BUNDLE to write", "give BUNDLE, or --standalone alone")
    need_export_extra()
    from ..export.checkpoints import load_motion_adapter
    from ..export.motion_module import check_standalone, export_standalone, replace_motion_module

    if standalone is not None:
        check_standalone(temporal_norm.value, standalone)
    if bundle is not None:
        before = _manifest(bundle)
        manifest, lines = replace_motion_module(motion_adapter, bundle, output, dry_run=dry_run)
        _finish(bundle, before, manifest, lines, output, dry_run=dry_run)
    if standalone is not None and dry_run:
        load_motion_adapter(motion_adapter)
        typer.echo(f"would write {standalone}")
    elif standalone is not None:
        error = export_standalone(motion_adapter, temporal_norm.value, standalone)
        typer.echo(f"{standalone}: largest error {error:.1e} (relative)")


def lora(
    bundle: Bundle,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH|HUB[=WEIGHT]", help="A LoRA to fuse; repeatable. Without any, the base is left."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB|FILE", help="The bundle's base; by default its name on the hub."),
    ] = None,
    motion_adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB|FILE", help="The bundle's motion modules; by default their name on the hub."),
    ] = None,
    base_config: Annotated[
        str | None, typer.Option(metavar="DIR|HUB", help="For a base in one file, as for `export`.")
    ] = None,
    variant: Variant = None,
    dry_run: DryRun = False,
    output: Output = None,
) -> None:
    """Replace all LoRAs of a bundle by others.

    Fused LoRAs cannot be taken out again, so that base and motion modules are read once more.
    """
    need_export_extra()
    from ..export.loading import BASE_CONFIG, LoadOptions
    from ..export.lora_files import Lora
    from ..export.lora_swap import replace_loras

    loras = [Lora.parse(text) for text in lora or ()]
    before = _manifest(bundle)
    options = LoadOptions(base_config or BASE_CONFIG, variant)
    manifest, lines = replace_loras(bundle, loras, base, motion_adapter, options, output, dry_run=dry_run)
    _finish(bundle, before, manifest, lines, output, dry_run=dry_run)


def controlnet(
    bundle: Bundle,
    scribble: Annotated[
        str | None, typer.Option(metavar="DIR|HUB|FILE", help="The new SparseCtrl for scribbles.")
    ] = None,
    rgb: Annotated[str | None, typer.Option(metavar="DIR|HUB|FILE", help="The new SparseCtrl for pictures.")] = None,
    variant: Variant = None,
    dry_run: DryRun = False,
    output: Output = None,
) -> None:
    """Replace a SparseCtrl of a bundle by one of the same architecture, and compare it with torch."""
    controlnets = {kind: source for kind, source in (("scribble", scribble), ("rgb", rgb)) if source is not None}
    if not controlnets:
        raise InvalidRequest("export controlnet", "nothing to replace", "give --scribble, --rgb or both")
    need_export_extra()
    from ..export.controlnet_swap import replace_controlnets
    from ..export.loading import BASE_CONFIG, LoadOptions

    before = _manifest(bundle)
    options = LoadOptions(BASE_CONFIG, variant)
    manifest, lines = replace_controlnets(bundle, controlnets, options, output, dry_run=dry_run)
    _finish(bundle, before, manifest, lines, output, dry_run=dry_run)


def _manifest(bundle: Path) -> "Manifest":
    from ..runtime.format.bundle import bundle_folder
    from ..runtime.format.manifest import read_manifest

    return read_manifest(bundle_folder(bundle))


def _finish(
    bundle: Path, before: "Manifest", manifest: "Manifest", lines: list[str], output: Path | None, *, dry_run: bool
) -> None:
    """Prints what has changed, and rebuilds or keeps the engines of the bundle."""
    names = sorted(before.sources.keys() | manifest.sources.keys())
    for name in names:
        old, new = before.sources.get(name, "none"), manifest.sources.get(name, "none")
        if old != new:
            typer.echo(f"{name}: {new}, was {old}")
    steps = before.scheduler.original_inference_steps, manifest.scheduler.original_inference_steps
    if steps[0] != steps[1]:
        typer.echo(f"original_inference_steps: {steps[1]}, was {steps[0]}")
    for line in lines:
        typer.echo(f"{'would replace' if dry_run else 'replaced'} {line}")
    if dry_run:
        return
    from ..runtime.backends import BACKENDS
    from ..runtime.format.refittable_engines import keep_refittable
    from .build import build_export_engines

    target = output or bundle
    build_export_engines(target, again=output is None)
    others = [name for name, record in BACKENDS.items() if not record.built_at_export]
    for line in keep_refittable(target, before, manifest, others):
        typer.echo(line)
