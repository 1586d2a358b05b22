"""`sparsectrl-lcm inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..runtime.format.bundle import Bundle


def inspect(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE|CLIP]", help="A folder from `export` (the demo bundle by default), or a clip."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="List split attentions and norms in fp32 of TensorRT's engines.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a bundle holds, check its files, and list its engines. Of a clip, show what it was made from."""
    from rich.table import Table

    from ..runtime.format.bundle import Bundle
    from .clip_metadata import is_clip, show_clip
    from .tables import print_table

    if bundle is not None and is_clip(bundle):
        show_clip(bundle, as_json=json)
        return
    opened = Bundle.load(bundle)
    if json:
        import json as encoder

        from .inspect_json import bundle_facts

        typer.echo(encoder.dumps(bundle_facts(opened), indent=1))
        return
    manifest = opened.manifest
    sizes, scheduler, trained = manifest.sizes, manifest.scheduler, manifest.trained_for
    facts = {
        "bundle": str(opened.folder),
        "made by": manifest.created_by,
        **{name.replace("_", " "): source for name, source in manifest.sources.items()},
        "clip": f"{sizes.frames} frames of {sizes.width}x{sizes.height} (sides: multiples of {sizes.multiple})",
        "keyframes": " or ".join(manifest.controlnets) or "none",
        "temporal norm": manifest.temporal_norm,
        "schedule": f"LCM, {scheduler.beta_schedule} betas, {scheduler.original_inference_steps} original steps",
    }
    if trained is not None:
        frames = f"{trained.frames} frames of {trained.width}x{trained.height}"
        facts["trained for"] = f"{frames}, {trained.keyframes} keyframes"
        if trained.words is not None:
            facts["words"] = ", ".join(trained.words)
    for name, value in facts.items():
        typer.echo(f"{name + ':':<22}{value}")
    table = Table("graph", "weights", "inputs", "outputs", "largest error")
    for name, graph in manifest.graphs.items():
        weights = sum(manifest.files[file].bytes for file in graph.weights)
        unit = "levels" if graph.outputs[0].dtype == "uint8" else "relative"
        counts = str(len(graph.inputs)), str(len(graph.outputs))
        table.add_row(name, f"{weights / 1e6:.1f} MB", *counts, f"{graph.max_error:.1e} {unit}")
    print_table(table)
    _show_engines(opened, details=layers)


def _show_engines(bundle: "Bundle", *, details: bool) -> None:
    """Prints the built engines: keys, sizes, damage, and what the builder reported."""
    from rich.markup import escape
    from rich.table import Table

    from ..engine.unfinished_sets import unfinished_sets
    from ..runtime.backends import BACKENDS
    from ..runtime.errors import BackendError, message
    from ..runtime.format.engine_sets import find_set, set_names
    from .layer_facts import layer_details
    from .tables import print_table

    for backend in BACKENDS:
        for name in set_names(bundle.folder, backend):
            try:
                engines = find_set(bundle.folder, backend, name)
            except BackendError as error:
                typer.echo(message("", error.reason, error.remedy))
                continue
            if engines is None:
                continue
            columns = ("engine", "key", "size", "version", "device", "layers", "attention", "fp32 norms", "moved")
            slots = engines.index.keyframe_slots
            taken = f" for {slots} keyframes" if slots else ""
            table = Table(*columns, title=escape(f"{backend} {name}{taken} in {engines.folder.parent}"))
            faults = []
            for graph, record in engines.index.engines.items():
                size = sum(file.bytes for file in record.files.values())
                facts = (f"{size / 1e6:.1f} MB", record.spec.version, record.spec.device)
                cells = (graph, record.key[:12], *facts, _layers(record.report), _attention(record.report))
                table.add_row(*map(escape, (*cells, *_norms_and_bytes(record.report))))
                if graph not in bundle.manifest.graphs or (fault := engines.fault(bundle.manifest, graph)) is None:
                    continue
                faults.append(fault)
            print_table(table)
            for fault in faults:
                typer.echo(f"damaged: {fault}")
            for graph, record in engines.index.engines.items() if details else ():
                for line in layer_details(record.report):
                    typer.echo(f"{graph}: {line}")
        for name, graphs, size in unfinished_sets(bundle.folder, backend):
            kept = f"{', '.join(graphs)} ({size / 1e6:.1f} MB)"
            typer.echo(f"{backend} {name} is unfinished: the next `build` with the same options goes on after {kept}")


def _layers(report: dict[str, Any]) -> str:
    """Returns the four most frequent layer types with their counts."""
    layers = report.get("layers")
    if not isinstance(layers, dict):
        return "-"
    return ", ".join(f"{count} {kind}" for kind, count in list(layers.items())[:4]) or "-"


def _attention(report: dict[str, Any]) -> str:
    """Returns how many attentions were fused, as far as the builder reported it."""
    if "attention fused" in report:
        return f"{report['attention fused']} spatial fused"
    reported = report.get("attention")
    if not isinstance(reported, dict) or not all(isinstance(counts, dict) for counts in reported.values()):
        return "-"
    parts = [f"{kind} {counts.get('fused')} fused, {counts.get('split')} split" for kind, counts in reported.items()]
    return "; ".join(parts) or "-"


def _norms_and_bytes(report: dict[str, Any]) -> tuple[str, str]:
    """Returns how many norms write fp32, and the bytes that one run moves."""
    from ..runtime.format.layer_report import LayerReport
    from .layer_facts import size_of

    layers = LayerReport.of(report)
    if layers is None:
        return "-", "-"
    norms = f"{len(layers.fp32_norms)} of {layers.norms}" if layers.norms else "-"
    return norms, size_of(layers.bytes_moved) if layers.bytes_moved is not None else "-"
