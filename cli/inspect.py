"""`sparsectrl-lcm inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..runtime.bundle import Bundle


def inspect(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; by default the demo bundle.")] = None,
) -> None:
    """Show what a bundle holds, and verify its files."""
    from rich.console import Console
    from rich.table import Table

    from ..runtime.bundle import Bundle

    opened = Bundle.load(bundle)
    manifest = opened.manifest
    sizes, scheduler = manifest.sizes, manifest.scheduler
    facts = {
        "bundle": str(opened.folder),
        "made by": manifest.created_by,
        **{name.replace("_", " "): source for name, source in manifest.sources.items()},
        "clip": f"{sizes.frames} frames of {sizes.width}x{sizes.height} (sides: multiples of {sizes.multiple})",
        "keyframes": f"up to {manifest.keyframe_slots}, {' or '.join(manifest.controlnets) or 'none'}",
        "temporal norm": manifest.temporal_norm,
        "schedule": f"LCM, {scheduler.beta_schedule} betas, {scheduler.original_inference_steps} original steps",
    }
    for name, value in facts.items():
        typer.echo(f"{name + ':':<22}{value}")
    table = Table("graph", "weights", "inputs", "outputs", "largest error")
    for name, graph in manifest.graphs.items():
        weights = sum(manifest.files[file].bytes for file in graph.weights)
        unit = "levels" if graph.outputs[0].dtype == "uint8" else "relative"
        counts = str(len(graph.inputs)), str(len(graph.outputs))
        table.add_row(name, f"{weights / 1e6:.1f} MB", *counts, f"{graph.max_error:.1e} {unit}")
    Console().print(table)
    _show_engines(opened)


def _show_engines(bundle: "Bundle") -> None:
    """The engines that were built, their keys, and what the builder said of them."""
    from rich.console import Console
    from rich.table import Table

    from ..runtime.backends import BACKENDS
    from ..runtime.engines import find_set, set_names

    for backend in BACKENDS:
        for name in set_names(bundle.folder, backend):
            engines = find_set(bundle.folder, backend, name)
            if engines is None:
                continue
            table = Table(
                "engine", "key", "size", "version", "device", "layers", "attention", title=f"{backend} {name}"
            )
            for graph, record in engines.index.engines.items():
                size = sum(file.bytes for file in record.files.values())
                spec, report = record.spec, record.report
                layers = ", ".join(f"{count} {kind}" for kind, count in list(report.get("layers", {}).items())[:4])
                facts = f"{size / 1e6:.1f} MB", spec.version, spec.device
                table.add_row(graph, record.key[:12], *facts, layers or "-", _attention(report))
            Console().print(table)


def _attention(report: dict[str, Any]) -> str:
    """Whether attention was fused: spatial and temporal, as far as the builder told."""
    if "attention fused" in report:
        return f"{report['attention fused']} spatial fused"
    told = report.get("attention", {})
    parts = [f"{kind} {counts['fused']} fused, {counts['split']} split" for kind, counts in told.items()]
    return "; ".join(parts) or "-"
