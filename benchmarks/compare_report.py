"""Medians, ratios and rates from the samples of compare.py, and the table of results."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from sparsectrl_lcm.benchmarks.harness.rounds import summarize
from sparsectrl_lcm.runtime.format.decoders import DECODERS

STEPWISE = ("control", "denoise")
"""Stages that run their graph once per step."""

Report = dict[str, Any]


def evaluate(report: Report, baseline: str) -> None:
    """Adds medians, ratios and rates to a report.

    Args:
        report: has the samples of each contender.
        baseline: a contender. Ratios are to it and to the fastest diffusers with the same decoder.
    """
    rows: dict[str, Report] = report["contenders"]
    limits = [probe for row in rows.values() for probe in row["probes"]]
    report["limits"] = {name: median(probe[name] for probe in limits) for name in limits[0]} if limits else None
    for row in rows.values():
        row["summary"] = summarize(row["samples"])
    totals = {
        name: {kind: stages["total"]["median"] for kind, stages in row["summary"].items()} for name, row in rows.items()
    }
    fastest = {decoder: fastest_diffusers(rows, totals, decoder) for decoder in DECODERS.values()}
    report["baselines"] = {"reference": baseline, "fastest": fastest[DECODERS["full"]]}
    if tiny := fastest[DECODERS["tiny"]]:
        report["baselines"]["fastest_tiny"] = tiny
    for name, row in rows.items():
        others = {"reference": baseline, "fastest": fastest[row["graphs"]["decode"]]}
        row["times_faster"] = {
            what: ratios(totals[name], totals.get(other or "", {}).get("first")) for what, other in others.items()
        }
        first = {stage: spread["median"] for stage, spread in row["summary"].get("first", {}).items()}
        row["flops_per_s"] = rates(first, row["graphs"], report["work"], report["request"]["steps"])
        peak = report["limits"] and report["limits"]["flops_per_s"]
        row["of_product"] = row["flops_per_s"]["denoise"] / peak if peak and "denoise" in row["flops_per_s"] else None


def fastest_diffusers(
    rows: Mapping[str, Report], totals: Mapping[str, Mapping[str, float]], decoder: str
) -> str | None:
    """The diffusers contender with this decoder graph whose first requests have the smallest median."""
    theirs = {
        name: kinds["first"]
        for name, kinds in totals.items()
        if name.startswith("diffusers") and rows[name]["graphs"]["decode"] == decoder and kinds
    }
    return min(theirs, key=lambda name: theirs[name]) if theirs else None


def ratios(seconds: Mapping[str, float], reference: float | None) -> dict[str, float]:
    """How many times faster than `reference` each kind of request is."""
    return {kind: reference / value for kind, value in seconds.items()} if reference else {}


def rates(
    seconds: Mapping[str, float], graphs: Mapping[str, str], work: Mapping[str, Mapping[str, int]], steps: int
) -> dict[str, float]:
    """Floating-point operations per second of each stage, counted in the portable graphs.

    Args:
        seconds: seconds of each stage.
        graphs: the graph of each stage.
        work: `flops` of each graph.
        steps: number of runs of each graph in the loop.
    """
    return {
        stage: work[graph]["flops"] * (steps if stage in STEPWISE else 1) / seconds[stage]
        for stage, graph in graphs.items()
        if graph in work and seconds.get(stage)
    }


def markdown_table(report: Report) -> str:
    """The results as a Markdown table: one row for each contender, medians with their spread."""
    heads = [
        *("", "new prompt", "next seed", "x diffusers fp32", "x fastest diffusers"),
        *("control", "denoise", "decode", "UNet TFLOP/s", "memory GB", "difference"),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in report["contenders"].items():
        if not row["summary"]:
            lines.append(f"| {name} | {row['failed']} |" + " |" * (len(heads) - 2))
            continue
        first, second = row["summary"]["first"], row["summary"].get("second_seed")
        cells = [name, _spread(first["total"]), _spread(second["total"]) if second else "-"]
        cells += [_ratios(row["times_faster"][what]) for what in ("reference", "fastest")]
        cells += [_seconds(first[stage]["median"]) if stage in first else "-" for stage in (*STEPWISE, "decode")]
        cells += [_rate(row), _gigabytes(row["peak_bytes"]), _difference(row.get("difference"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def legend(report: Report) -> str:
    """The lines below the table: the request, the machine's limits, and the meaning of the columns."""
    request, limits = report["request"], report["limits"]
    rounds = max((len(_first(row)) for row in report["contenders"].values()), default=0)
    lines = [
        f"{request['frames']} frames of {request['width']}x{request['height']}, {request['steps']} steps, "
        f"{report['threads']} threads; seconds, medians of {rounds} rounds (smallest .. largest).",
        "Times faster: new prompt / next seed. The fastest diffusers has the same decoder, full or tiny;",
        "diffusers fp32 uses the full decoder. Memory: the process's peak. Difference: frames against diffusers fp32,",
        "mean levels of 255 (largest), all decoded with the full decoder.",
    ]
    if limits:
        lines.append(
            f"torch's product of two 4096x4096 matrices in bf16: {limits['flops_per_s'] / 1e12:.3g} TFLOP/s "
            f"(100 %); a copy of memory: {limits['bytes_per_s'] / 1e9:.3g} GB/s."
        )
    return "\n".join(lines)


def _first(row: Report) -> list[float]:
    return list(row["samples"].get("first", {}).get("total", []))


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def _spread(seconds: Mapping[str, float]) -> str:
    low, high = _seconds(seconds["min"]), _seconds(seconds["max"])
    return f"{_seconds(seconds['median'])} ({low} .. {high})"


def _ratios(times: Mapping[str, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in times.values()) or "-"


def _rate(row: Report) -> str:
    if "denoise" not in row["flops_per_s"]:
        return "-"
    share = f" ({row['of_product']:.0%})" if row["of_product"] else ""
    return f"{row['flops_per_s']['denoise'] / 1e12:.3g}{share}"


def _gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.1f}"


def _difference(levels: Mapping[str, float] | None) -> str:
    return f"{levels['mean']:.2g} ({levels['max']})" if levels else "-"
