"""Makes the tables of the documents from the results files that they cite."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = {
    "diffusers-fp32": "diffusers fp32",
    "diffusers-fp32-compiled": "diffusers fp32, compiled",
    "diffusers-bf16": "diffusers bf16",
    "diffusers-bf16-compiled": "diffusers bf16, compiled",
    "openvino-fp32": "OpenVINO fp32",
    "openvino-bf16": "OpenVINO bf16",
    "openvino-int8-tiny": "OpenVINO int8, tiny decoder",
}


def read(name: str) -> dict[str, Any]:
    """A results file."""
    report: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return report


def fastest_diffusers(report: dict[str, Any]) -> float:
    """The median, in seconds, of the fastest diffusers contender."""
    rows = report["contenders"].items()
    return min(row["summary"]["first"]["total"]["median"] for name, row in rows if name.startswith("diffusers"))


def compare_rows(report: dict[str, Any]) -> Iterator[str]:
    """A row for each contender of `benchmarks/compare.py`. Ratios are to the fastest diffusers."""
    yield "| | new prompt | next seed | times as fast | control | denoise | decode | memory, GB |"
    yield "|---|---|---|---|---|---|---|---|"
    base = fastest_diffusers(report)
    for name, row in report["contenders"].items():
        first, second = row["summary"]["first"], row["summary"].get("second_seed")
        ratios = [base / kind["total"]["median"] for kind in (first, second) if kind]
        cells = [
            NAMES[name],
            _spread(first["total"]),
            _spread(second["total"]) if second else "-",
            " and ".join(f"{ratio:.2f}" for ratio in ratios),
            *(f"{first[stage]['median']:.1f}" for stage in ("control", "denoise", "decode")),
            f"{row['peak_bytes'] / 1e9:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _spread(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.1f} ({seconds['min']:.1f} .. {seconds['max']:.1f})"


def scaling_rows(report: dict[str, Any]) -> Iterator[str]:
    """Seconds of one axis of `benchmarks/compare.py --scaling`."""
    points = report["scaling"]["points"]
    yield f"| pixels a side | {' | '.join(str(point['value']) for point in points)} |"
    yield "|---" * (len(points) + 1) + "|"
    for label, kind in (("new prompt", "first"), ("next seed", "second_seed")):
        seconds = [f"{point['samples'][kind][0]['total']:.1f}" for point in points]
        yield f"| {label} | {' | '.join(seconds)} |"


def full_size_rows(report: dict[str, Any]) -> Iterator[str]:
    """`benchmarks/full_size.py`."""
    yield "| size | | control | denoise | decode | total | next seed | memory, GB | frames differ by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for size, sides in report["sizes"].items():
        for side in ("sparsectrl-lcm", "diffusers"):
            row = sides[side]
            seconds = [f"{row[stage]:.1f}" for stage in ("control", "denoise", "decode", "total")]
            second = f"{row['second_seed']:.1f}" if "second_seed" in row else "-"
            away = sides["difference"]
            differ = f"at most {away['max']}, {away['mean']:.4f} in the mean" if side == "sparsectrl-lcm" else ""
            yield f"| {size} | {side} | {' | '.join(seconds)} | {second} | {row['peak_gb']:.1f} | {differ} |"


def build_rows(report: dict[str, Any]) -> Iterator[str]:
    """`benchmarks/tensorrt_build.py`."""
    yield "| precision | graph | build | with check | memory, GB | engine, GB | largest error |"
    yield "|---|---|---|---|---|---|---|"
    for precision, graphs in report["builds"].items():
        for graph, row in graphs.items():
            if graph == "lcm_update":
                continue
            error = row.get("largest_error")
            unit = f"{error:.2f} levels" if error and graph == "vae_decoder" else f"{error:.1e}" if error else "-"
            seconds = f"{row['build_seconds']:.1f} | {row['total_seconds']:.1f}"
            yield f"| {precision} | {graph} | {seconds} | {row['peak_gb']:.1f} | {row['engine_gb']:.2f} | {unit} |"


def cpp_rows(report: dict[str, Any]) -> Iterator[str]:
    """The comparison with stable-diffusion.cpp."""
    yield "| | denoise | decode | total |"
    yield "|---|---|---|---|"
    rows = {"stable-diffusion.cpp f16": report["stable_diffusion_cpp"]["seconds"]}
    rows |= {f"OpenVINO {precision}": report["sparsectrl_lcm"]["seconds"][precision] for precision in ("bf16", "int8")}
    for name, row in rows.items():
        yield f"| {name} | {' | '.join(f'{row[stage]:.1f}' for stage in ('denoise', 'decode', 'total'))} |"


def long_clip_rows(report: dict[str, Any]) -> Iterator[str]:
    """`demo/long_clips.py`: the mean share on the path, the highest ratio of changes at seams to those elsewhere."""
    yield "| | straight: on the path | seams | winding: on the path | seams |"
    yield "|---|---|---|---|---|"
    for name, row in report.items():
        if isinstance(row, dict) and "straight" in row:
            kinds = (row[kind] for kind in ("straight", "winding"))
            cells = [f"{kind['on_path']:.1%} | {kind['highest_ratio']:.2f}" for kind in kinds]
            yield f"| {name} | {' | '.join(cells)} |"


def quality_rows(report: dict[str, Any]) -> Iterator[str]:
    """`demo/precisions.py`: shares of requests with the requested colour and shape, PSNR to fp32 in dB."""
    yield "| engines | colour | shape | PSNR, mean | PSNR, lowest of a request |"
    yield "|---|---|---|---|---|"
    for name, row in report.items():
        if isinstance(row, dict) and "colour" in row:
            backend, precision = name.split(":")
            found = f"{row['psnr']:.1f} dB | {row['worst_psnr']:.1f} dB" if "psnr" in row else "- | -"
            yield f"| `{backend}` {precision} | {row['colour']:.1%} | {row['kind']:.1%} | {found} |"


def fp16_error_rows(report: dict[str, Any]) -> Iterator[str]:
    """Mean, least and greatest error of the fp16 graphs over the draws of their inputs."""
    graphs = {"unet": "UNet", "controlnet_scribble": "SparseCtrl, scribbles", "controlnet_rgb": "SparseCtrl, rgb"}
    for graph, label in (graphs | {"vae_decoder": "decoder"}).items():
        digits = ".3f" if graph == "vae_decoder" else ".1e"
        cells = []
        for column in ("before", "as_built"):
            found = [largest for _, largest, _ in report["graphs"][graph][column]]
            cells.append(f"{mean(found):{digits}} ({min(found):{digits}} to {max(found):{digits}})")
        yield f"| {label} | {' | '.join(cells)} |"


def int8_error_rows(report: dict[str, Any]) -> Iterator[str]:
    """Largest errors of int8 beside bf16 at full size, for draws of random inputs and for inputs of requests."""
    graphs = {"unet": "UNet", "controlnet_scribble": "SparseCtrl, scribbles", "controlnet_rgb": "SparseCtrl, rgb"}
    for graph, label in graphs.items():
        for kind, columns in report["errors"][graph]["beside_bf16"].items():
            found = [[f"{row['largest']:.3f}" for row in columns[name]] for name in ("before", "as_built")]
            yield f"| {label} | {kind} | {' | '.join(map(', '.join, found))} |"


def kernel_rows(label: str, graphs: dict[str, Any]) -> Iterator[str]:
    """What the engines of `benchmarks/tensorrt_build.py` are made of."""
    for graph in ("controlnet_scribble", "controlnet_rgb", "unet", "vae_decoder"):
        if row := graphs.get(graph):
            counts = f"{sum(row['kernels'].values())} | {sum(row['fused_attentions'].values())}"
            share = f"{row['fp8_share']:.1%}" if row["fp8_share"] else "-"
            norms = f"{row['fp32_norms']} of {row['norms']}"
            yield f"| {label} | {graph} | {counts} | {norms} | {row['gb_moved']:.1f} | {share} |"


PROCESSES = {
    "server": "server",
    "runners": "replicas",
    "serve controller": "Serve's controller",
    "raylets": "3 raylets",
    "gcs_server": "GCS",
    "other workers": "other workers",
    "log monitors": "log monitors",
}


def process_rows(report: dict[str, Any]) -> Iterator[str]:
    """`benchmarks/runner_pool.py --pool ray`: processor time of a request, and of a second at rest, by process."""
    one, eight = report["medians"]["1"], report["medians"]["8"]
    yield "| | 1 replica | 8 replicas | a second without requests, 8 replicas |"
    yield "|---|---|---|---|"
    columns = one["processor_ms"], eight["processor_ms"], eight["idle_ms"]
    for kind, label in PROCESSES.items():
        yield f"| {label} | {' | '.join(f'{column.get(kind, 0):.1f}' for column in columns)} |"
    yield f"| all, with the client | {' | '.join(f'{sum(column.values()):.1f}' for column in columns)} |"


TABLES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "2026-11-30-runner-pool-ray-quiet-2.json": process_rows,
    "2026-11-29-compare-bf16-epyc-avx512bf16.json": compare_rows,
    "2026-11-27-compare-2cores.json": compare_rows,
    "2026-11-28-compare-fp32-2cores.json": compare_rows,
    "2026-11-29-compare-fp32-2cores-4frames.json": compare_rows,
    "2026-11-29-compare-2cores-4frames.json": scaling_rows,
    "2026-11-22-full-size-cpu.json": full_size_rows,
    "2026-11-22-tensorrt-rtx-build-cpu.json": build_rows,
    "2026-11-29-stable-diffusion-cpp.json": cpp_rows,
}
"""The function that makes each results file's table in docs/benchmarks.md."""


def table(name: str) -> str:
    """The table of a results file, as in docs/benchmarks.md."""
    return "\n".join(TABLES[name](read(name)))
