"""Compares the frames of precisions with those of fp32, on held-out requests with scribbles.

    python demo/precisions.py BACKEND:PRECISION ... [--bundle DIR] [--requests 200] [--rows FILE] [--json FILE]

such as `tensorrt:fp16 tensorrt:bf16 openvino:int8`. The engines of a GPU backend are emulated on the CPU: their typed
graphs run with every result rounded to its type. Those of a CPU backend have to be built. The reference is the portable
graphs in fp32 on ONNX Runtime.

`--rows FILE` appends a line of JSON for each clip, and takes the clips that are in it as made: an interrupted run
goes on where it stopped. Name a new file after a change of the code.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evaluate import PACKAGES, Make, mean, with_runtime, with_scribbles
from measure import psnr
from rich.progress import track
from sparsectrl_lcm.engine.emulated_sessions import EmulatedSessions
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.backends import find_backend
from sparsectrl_lcm.runtime.cpu.executor import HostExecutor
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.machine import report_head
from world import HELD_OUT_SEED, scene

REFERENCE = "onnxruntime:fp32"
Row = dict[str, Any]


def open_pipeline(bundle: Bundle, name: str, threads: int | None) -> VideoPipeline:
    """Opens the engines of a CPU backend, or emulates those of a GPU; `name` is BACKEND:PRECISION."""
    backend, _, precision = name.partition(":")
    if find_backend(backend).emulation:
        return VideoPipeline(bundle, HostExecutor(bundle, EmulatedSessions(bundle, backend, precision, threads), 0))
    return VideoPipeline.load(bundle.folder, backend=backend, precision=precision, threads=threads, kept_bytes=0)


def compare(makers: Mapping[str, Make], reference: Make, requests: int, done: list[Row]) -> Iterator[Row]:
    """Makes the clips that are not done yet, and yields the figures of each.

    Args:
        makers: by name.
        reference: makes the clips that the others are compared with.
        requests: number of held-out scenes.
        done: the rows of clips made before.
    """
    found = {(row["maker"], row["request"]) for row in done}
    for number in track(range(requests), "requests"):
        missing = [name for name in (REFERENCE, *makers) if (name, number) not in found]
        if not missing:
            continue
        world = scene(HELD_OUT_SEED + number)
        expected = reference(world, "scribble", number)
        for name in missing:
            frames = expected if name == REFERENCE else makers[name](world, "scribble", number)
            row: Row = {"maker": name, "request": number, **with_scribbles(frames, world)}
            yield row if name == REFERENCE else {**row, "psnr": psnr(frames, expected)}


def summary(rows: list[Row], name: str) -> dict[str, Any]:
    """Means of a maker's rows, with their difference to the reference in colour and shape, and the PSNR in dB."""
    its, exact = ([row for row in rows if row["maker"] == maker] for maker in (name, REFERENCE))
    figures = [key for key in its[0] if key not in ("maker", "request", "psnr")]
    report: dict[str, Any] = {key: mean(row[key] for row in its) for key in figures}
    if name != REFERENCE:
        difference = {key: report[key] - mean(row[key] for row in exact) for key in ("colour", "kind")}
        found = [row["psnr"] for row in its]
        worst = int(np.argmin(found))
        report |= {"difference": difference, "psnr": mean(found), "worst_psnr": found[worst]}
        report |= {"worst_request": its[worst]["request"]}
    return report


def read_rows(path: Path | None) -> list[Row]:
    """Returns the rows of a file, without a line that an interrupted run left unfinished."""
    if path is None or not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def add_rows(path: Path, rows: list[Row]) -> None:
    """Appends rows to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Prints the figures, and writes them to the file of --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="+", metavar="BACKEND:PRECISION")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    pipelines = {name: open_pipeline(bundle, name, options.threads) for name in (REFERENCE, *options.precisions)}
    makers = {name: with_runtime(pipeline) for name, pipeline in pipelines.items()}
    reference = makers.pop(REFERENCE)
    rows = read_rows(options.rows)
    for row in compare(makers, reference, options.requests, rows):
        rows.append(row)
        if options.rows:
            add_rows(options.rows, [row])
    rows = [row for row in rows if row["request"] < options.requests]
    command = f"python demo/precisions.py {' '.join(options.precisions)} --requests {options.requests}"
    report = report_head(command, PACKAGES) | {"requests": options.requests}
    report |= {name: summary(rows, name) for name in (REFERENCE, *makers)}
    text = json.dumps(report, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
