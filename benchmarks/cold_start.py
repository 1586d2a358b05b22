"""Seconds from the start of a process to the demo's clip on disk: with an empty cache, and in the next process.

    python benchmarks/cold_start.py [--rounds 3] [--json FILE]

Each round starts `generate` twice on every backend that runs the demo bundle here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from sparsectrl_lcm.runtime.backends import BACKENDS, can_run
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.machine import report_head
from sparsectrl_lcm.runtime.operating_system import usable_cores

ROOT = Path(__file__).parent.parent
PROMPT = "a yellow star grows over a navy and teal ground"
KEYFRAMES = (0, 8, 15)
PROCESSES = ("first", "second")


def seconds_to_clip(backend: str, folder: Path) -> float:
    """Runs one process with its cache in a folder."""
    keyframes = [f"--keyframe={index}={ROOT}/demo/scribbles/frame_{index:02}.png" for index in KEYFRAMES]
    request = ["--prompt", PROMPT, *keyframes, "--seed", "4", "--backend", backend, "-o", str(folder / "clip.mp4")]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "sparsectrl_lcm", "generate", *request],
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - start


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    backends = [name for name in BACKENDS if can_run(Bundle.load(), name)]
    seconds: dict[str, dict[str, list[float]]] = {name: {process: [] for process in PROCESSES} for name in backends}
    for _ in range(options.rounds):
        for backend in backends:
            with tempfile.TemporaryDirectory() as folder:
                for process in PROCESSES:
                    seconds[backend][process].append(round(seconds_to_clip(backend, Path(folder)), 2))
    report = report_head(f"python {' '.join(sys.argv)}", ("sparsectrl-lcm", "openvino", "onnxruntime", "numpy"))
    report |= {"cores": usable_cores(), "rounds": options.rounds, "seconds": seconds}
    report["medians"] = {name: {process: median(of[process]) for process in PROCESSES} for name, of in seconds.items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, of in report["medians"].items():
        print(f"{name:<18}{of['first']:>8.1f}{of['second']:>8.1f}")


if __name__ == "__main__":
    main()
