"""`sparsectrl-lcm build`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import parse_size

if TYPE_CHECKING:
    from ..runtime.format.build_options import BuildOptions
    from ..runtime.format.bundle import Bundle
    from ..runtime.format.engine_keys import EngineIndex


def build(
    bundle: Annotated[Path, typer.Argument(help="A folder from `export`.")],
    backend: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino or onnxruntime.")],
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="WxH", help="TensorRT: size in pixels; the bundle's by default; repeatable."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="TensorRT: frames of a clip; the bundle's by default.")] = None,
    keyframes: Annotated[
        int | None, typer.Option(help="TensorRT: most keyframes of a request; the bundle's by default, 3.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="GPU: fp16 (default), fp32, or bf16 and fp8 with TensorRT. "
            "openvino: bf16 if the processor computes in it, else fp32; or int8."
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare each graph with fp32 on the CPU.")] = True,
    graph: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Build only this graph, such as unet; repeatable. All by default."),
    ] = None,
    optimization_level: Annotated[int, typer.Option(help="TensorRT: 0 to 5, how long to look for faster kernels.")] = 3,
    aux_streams: Annotated[int, typer.Option(help="TensorRT: 0 to 16 streams besides the main one.")] = 0,
    workspace: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="TensorRT: memory that kernels may use while they work; all by default."),
    ] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="TensorRT: fp32 products may round their inputs to TF32.")
    ] = False,
    fp16_sums: Annotated[
        bool, typer.Option("--fp16-sums", help="TensorRT: products of fp16 may be added in fp16: faster on GeForce.")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="TensorRT: weights can be replaced later. The build then needs a GPU.")
    ] = False,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights",
            help="TensorRT: leave the weights out and read them from the bundle at load. The build then needs a GPU.",
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="tensorrt: the engine runs on later releases of the same major version."
        ),
    ] = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="tensorrt: none (one device), same-compute-capability or ampere-plus.")
    ] = "none",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(metavar="X.Y", help="tensorrt-rtx: build only for this one, such as 8.9; repeatable."),
    ] = None,
    transposed_upsampling: Annotated[
        bool,
        typer.Option(
            "--transposed-upsampling",
            help="TensorRT: one transposed convolution per upsampler, 4 products instead of 9. Not measured on a GPU.",
        ),
    ] = False,
    keep_source: Annotated[
        bool,
        typer.Option(
            "--keep-source",
            help="TensorRT: leave the typed ONNX graph beside each engine, for `polygraphy debug reduce`.",
        ),
    ] = False,
) -> None:
    """Turn the portable graphs of a bundle into engines of a backend.

    A build that was stopped keeps its finished engines. The same command goes on with the missing ones.

    Only tensorrt and tensorrt-rtx take the options marked TensorRT.
    """
    from ..engine.build import check_build
    from ..runtime.backends import availability
    from ..runtime.format.build_options import BuildOptions
    from ..runtime.format.bundle import Bundle

    sizes = dict.fromkeys(map(parse_size, size)) if size else [(None, None)]
    builds = [
        BuildOptions(
            width=width,
            height=height,
            frames=frames,
            keyframe_slots=keyframes,
            precision=precision,
            check=check,
            graphs=tuple(dict.fromkeys(graph or ())),
            optimization_level=optimization_level,
            aux_streams=aux_streams,
            workspace=workspace,
            tf32=tf32,
            fp16_sums=fp16_sums,
            refit=refit,
            strip_weights=strip_weights,
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatibility,
            compute_capabilities=tuple(compute_capability or ()),
            transposed_upsampling=transposed_upsampling,
            keep_source=keep_source,
        )
        for width, height in sizes
    ]
    check_build(backend, builds[0])  # before gigabytes are read
    opened = Bundle.load(bundle)
    built = [build_and_report(opened, backend, options) for options in builds]
    if not any(index.missing for index in built) and availability(backend).reason is None:
        typer.echo(f"try `{_clip_command(opened.folder, backend, builds[0])}`")


def _clip_command(bundle: Path, backend: str, options: "BuildOptions") -> str:
    """The command that makes a clip with the engines of a build."""
    from ..runtime.operating_system import quote_argument

    words = ["sparsectrl-lcm generate --bundle", quote_argument(str(bundle)), "--backend", backend]
    if options.width is not None:
        words += ["--size", f"{options.width}x{options.height}"]
    for name in ("frames", "precision"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    return " ".join([*words, "--prompt ... -o clip.mp4"])


def build_and_report(bundle: "Bundle", backend: str, options: "BuildOptions") -> "EngineIndex":
    """Builds a set of engines under a progress bar, says what was built, and returns it."""
    from ..engine.build import build
    from .progress_bar import Bar

    with Bar() as bar:
        engines = build(bundle, backend, options, bar.update)
        bar.update("done", 1.0)
    _report(engines.index)
    if engines.index.missing:
        rest = replace(options, graphs=())
        typer.echo(f"missing: {', '.join(engines.index.missing)}; run: {rest.command(bundle.folder, backend)}")
    return engines.index


def build_export_engines(bundle: Path, *, again: bool = False) -> None:
    """Builds the engines that `export` adds to a bundle.

    Args:
        bundle: the bundle's folder.
        again: whether to build only for backends that already have engines.
    """
    from ..runtime.backends import BACKENDS
    from ..runtime.format.build_options import BuildOptions
    from ..runtime.format.bundle import Bundle

    for name, record in BACKENDS.items():
        if record.built_at_export and (not again or record.has_engines(bundle, None)):
            build_and_report(Bundle.load(bundle), name, BuildOptions())


def _report(index: "EngineIndex") -> None:
    from ..engine.comparison import BOUNDS
    from ..runtime.format.decoders import DECODERS
    from .layer_facts import layer_facts

    for graph, record in index.engines.items():
        frames = graph in DECODERS.values()
        report = record.report
        facts = [f"{sum(file.bytes for file in record.files.values()) / 1e6:.1f} MB"]
        if "attention fused" in report:
            facts.append(f"{report['attention fused']} spatial attentions fused")
        if "seconds" in report:
            facts.append(f"built in {report['seconds']:.1f} s")
        facts += layer_facts(report)
        if report.get("errors"):
            unit = "levels from fp32 on average" if frames else "from fp32 (relative)"
            worst, bounds = max(report["errors"].values()), BOUNDS.get(index.precision)
            bound = bounds and (bounds.levels if frames else bounds.largest)
            above = f", above the bound of {bound:g}" if bound and worst > bound else ""
            facts.append(f"{worst:.1e} {unit}{above}")
        typer.echo(f"{graph}: {', '.join(facts)}")
    size = f"{index.size} " if index.size else ""
    built = len(index.engines)
    count = f"{built} of {built + len(index.missing)}" if index.missing else str(built)
    typer.echo(f"{index.backend} {size}{index.precision}: {count} engines")
