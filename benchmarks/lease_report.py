"""Turns the lines of lease.py into a results file, tables and a picture.

    python benchmarks/lease_report.py DIR/lease.jsonl
    python benchmarks/lease_report.py FIRST/lease.jsonl SECOND/lease.jsonl --output FILE.json

Of a stage that ran several times, the last line counts, unless an earlier one is done and the last is not. Rows of a
stage that ran when lease.py was killed are read from the files beside lease.jsonl. Lines that were cut off are left
out, and their number is printed. The exit code is 2 if no line is left, or a file cannot be read or written.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reports
from lease_stages.lines import Unusable, errors_in_a_line, read_objects
from lease_stages.processes import unfinished
from sparsectrl_lcm.benchmarks.harness.rounds import summarize

KINDS = {"new_keyframes": "first", "second_seed": "second_seed"}
"""Kinds of requests, by their names in compare.py."""
BASELINE = "diffusers-eager"
FIRST = "first_s"

Report = dict[str, Any]


def main() -> None:
    """Writes the results and the picture beside them, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", type=Path, help="lease.jsonl, in the order of the runs")
    parser.add_argument("--output", type=Path, help="a JSON file; default: a new one in benchmarks/results")
    options = parser.parse_args()
    with errors_in_a_line():
        write_report(options.lines, options.output)


def write_report(files: list[Path], output: Path | None) -> None:
    """Reports what the files hold.

    Raises:
        OSError: a file cannot be read or written.
        Unusable: no file holds a line of a stage.
    """
    lines: list[Report] = []
    for file in files:
        found, unreadable = read_lines(file)
        lines += found
        if unreadable:
            print(f"{file}: unreadable lines left out: {unreadable}", file=sys.stderr)
    if not lines:
        raise Unusable(f"{', '.join(map(str, files))}: no line of a stage")
    report = make_report(lines)
    name = report["device"]["name"] if report["device"] else "dry-run"
    path = reports.results_file(f"lease-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}", output)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(report)))
    print(f"\nwritten to {path}")
    if report["contenders"]:
        import plot  # needs matplotlib

        print("\n".join(f"drawn to {picture}" for picture in plot.draw(report, path)))


def read_lines(path: Path) -> tuple[list[Report], int]:
    """The lines of a run, then those of stages that ran when lease.py was killed; and how many are unreadable."""
    found, unreadable = read_objects(path)
    usable = [line for line in found if is_line(line)]
    return usable + list(unfinished(path.parent)), unreadable + len(found) - len(usable)


def is_line(line: Report) -> bool:
    """Whether an object has the fields of a stage's line."""
    rows = line.get("rows")
    texts = isinstance(line.get("stage"), str) and isinstance(line.get("state"), str)
    whole = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return texts and whole and isinstance(line.get("seconds"), int | float)


def make_report(lines: Iterable[Report]) -> Report:
    """The report of all stages."""
    stages: dict[str, Report] = {}
    for line in lines:
        if line["state"] == "done" or stages.get(line["stage"], line)["state"] != "done":
            stages[line["stage"]] = line
    facts: Report = {"head": {}, "device": None, "libraries": {}, "peak": None, "copies": None, "request": None}
    for line in stages.values():
        for row in line["rows"]:
            facts |= {name: row[name] for name in facts.keys() & row.keys()}
    head = facts.pop("head")
    return (
        head
        | facts
        | {
            "command": "python benchmarks/lease.py",
            "threads": head.get("machine", {}).get("cores"),
            "stages": [{name: value for name, value in line.items() if name != "rows"} for line in stages.values()],
            "missing": rows_with(stages, "device", "missing"),
            "first_requests": dict(first_requests(stages)),
            "tests": rows_with(stages, "tests", "test", "outcomes"),
            "events": rows_with(stages, "events", "stages_s"),
            "weights": rows_with(stages, "weights", "weights_s", "verified_s"),
            "kernels": rows_with(stages, "kernels", "kernel"),
            "limits": None,
            "contenders": dict(contenders(stages)),
        }
    )


def rows_with(stages: dict[str, Report], stage: str, *names: str) -> list[Report]:
    """The rows of a stage that have one of these fields."""
    return [row for row in stages.get(stage, {"rows": []})["rows"] if not row.keys().isdisjoint(names)]


def contenders(stages: dict[str, Report]) -> Iterator[tuple[str, Report]]:
    """Everything that ran whole requests, with the summary that plot.py draws."""
    for name, row in named(stages, "samples"):
        samples = {KINDS[kind]: taken | {"total": taken["wall"]} for kind, taken in row["samples"].items()}
        yield name, row | {"summary": summarize(samples)}


def first_requests(stages: dict[str, Report]) -> Iterator[tuple[str, Report]]:
    """Seconds of loading and of the first request, also of stages that were killed before they had samples."""
    for name, row in named(stages, FIRST):
        yield name, {field: row[field] for field in ("load_s", FIRST)}


def named(stages: dict[str, Report], field: str) -> Iterator[tuple[str, Report]]:
    """The rows with a field, each with the name of what ran."""
    for stage, line in stages.items():
        for row in line["rows"]:
            if field in row:
                name = "torch engines" if stage == "request" else stage
                yield f"{name}, {row['mode']}" if row.get("mode") else name, row


def tables(report: Report) -> Iterator[str]:
    """The stages, whole requests in milliseconds, and kernels in microseconds."""
    yield from ("| stage | state | seconds | |", "|---|---|---|---|")
    for line in report["stages"]:
        yield f"| {line['stage']} | {line['state']} | {line['seconds']:.1f} | {line.get('reason', '')} |"
    for row in report["missing"]:
        yield f"| device: {row['missing']} | missing | | {row['why']} |"
    for name, row in report["contenders"].items():
        if row.get("mode_warning"):
            yield f"| {name} | warning | | {row['mode_warning']} |"
    columns = ("control", "denoise", "decode")
    heads = ("milliseconds", "new keyframes (p95)", "next seed (p95)", "x eager", *columns, "first request, s")
    yield from ("", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads))
    eager = report["contenders"].get(BASELINE)
    for name, row in report["contenders"].items():
        middle, late = row["p50"], row["p95"]
        walls = [f"{1e3 * middle[kind]['wall']:.1f} ({1e3 * late[kind]['wall']:.1f})" for kind in KINDS]
        times = f"{eager['p50']['new_keyframes']['wall'] / middle['new_keyframes']['wall']:.2f}" if eager else "-"
        stages = middle["new_keyframes"]
        parts = [f"{1e3 * stages[stage]:.1f}" if stage in stages else "-" for stage in columns]
        yield f"| {' | '.join([name, *walls, times, *parts, f'{row[FIRST]:.1f}'])} |"
    for name, row in report["first_requests"].items():
        if name not in report["contenders"]:
            yield f"| {' | '.join([name, *['-'] * (len(heads) - 2), f'{row[FIRST]:.1f}'])} |"
    yield from ("", "| kernel | variant | input | microseconds | TFLOP/s |", "|---|---|---|---|---|")
    for row in report["kernels"]:
        shape = "x".join(map(str, row["shape"]))
        took = row.get("reason") or f"{1e6 * row['kernel_s']:.1f}"
        rate = f"{row['flops_per_s'] / 1e12:.1f}" if "flops_per_s" in row else "-"
        yield f"| {row['kernel']} | {row['variant']} | {shape} | {took} | {rate} |"


if __name__ == "__main__":
    main()
