"""`sparsectrl-lcm inspect`."""

from pathlib import Path
from typing import Annotated

import typer


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
