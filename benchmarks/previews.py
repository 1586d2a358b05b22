"""Measures what the previews of a clip cost: the share of a step that its preview takes, with the demo bundle.

python benchmarks/previews.py
python benchmarks/previews.py --backend openvino --threads 1 --rounds 20
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import reports
from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.machine import report_head

SCRIBBLES = Path(__file__).parents[1] / "demo/scribbles"
STEPS = 4
PACKAGES = ("numpy", "onnxruntime", "openvino")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", help="repeatable; default: openvino and onnxruntime")
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--output", type=Path, help="a JSON file; default: a new one in benchmarks/results")
    return parser.parse_args()


def measure(backend: str, threads: int | None, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step and of its preview, and the share, as median and largest of the rounds."""
    keyframes = [Keyframe(index, SCRIBBLES / f"frame_{index:02}.png") for index in (0, 8, 15)]
    found = []
    with VideoPipeline.load(backend=backend, threads=threads) as pipeline:
        for seed in range(rounds + 1):
            clip = pipeline.generate(
                "a yellow star moves up",
                keyframes,
                num_inference_steps=STEPS,
                seed=seed,
                on_preview=lambda *_: None,
            )
            found.append([clip.timings[stage] / STEPS * 1000 for stage in ("denoise", "previews")])
    steps, previews = zip(*found[1:], strict=True)  # the first one warms up
    shares = [preview / step for step, preview in found[1:]]
    return {
        "step_ms": round(median(steps), 2),
        "preview_ms": round(median(previews), 2),
        "share": {"median": round(median(shares), 4), "largest": round(max(shares), 4)},
    }


def main() -> None:
    options = arguments()
    backends = options.backend or ["openvino", "onnxruntime"]
    found = {backend: measure(backend, options.threads, options.rounds) for backend in backends}
    report = {**report_head(reports.command(), PACKAGES), "rounds": options.rounds, "backends": found}
    path = reports.results_file("previews", options.output)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print("| backend | step, ms | preview, ms | share |\n|---|---|---|---|")
    for backend, row in found.items():
        print(f"| {backend} | {row['step_ms']:.0f} | {row['preview_ms']:.1f} | {row['share']['median']:.1%} |")
    print(path)


if __name__ == "__main__":
    main()
