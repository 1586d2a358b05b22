"""Measures how long the host draws the noise of a request, and how much of it a GPU has to wait for.

    python benchmarks/noise.py
    python benchmarks/noise.py --size 768x768 --frames 16 --steps 12

A GPU waits for the first array if it has nothing else to do: with kept conditioning. The others are drawn meanwhile.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from sparsectrl_lcm.runtime.loop.noise import TorchGenerator
from sparsectrl_lcm.runtime.machine import machine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512x512", help="width x height; default: 512x512")
    parser.add_argument("--frames", type=int, default=16, help="default: 16")
    parser.add_argument("--steps", type=int, default=4, help="LCM steps; default: 4")
    parser.add_argument("--rounds", type=int, default=50, help="default: 50")
    return parser.parse_args()


def seconds(draw: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        draw()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    options = arguments()
    width, height = (int(side) for side in options.size.split("x"))
    shape = (1, 4, options.frames, height // 8, width // 8)
    arrays = [np.empty(shape, np.float32) for _ in range(options.steps)]
    generator = TorchGenerator(1)

    def draw_all() -> None:
        generator = TorchGenerator(1)
        for array in arrays:
            generator.randn(shape, array)

    rows = {
        "the generator": lambda: TorchGenerator(1),
        "the first array": lambda: generator.randn(shape, arrays[0]),
        f"all {options.steps} arrays": draw_all,
    }
    print(f"{machine()['processor']}, numpy {np.__version__}")
    print(f"| {options.size}x{options.frames}, {options.steps} steps | least, ms | median, ms |")
    print("|---|---|---|")
    for name, draw in rows.items():
        found = seconds(draw, options.rounds)
        print(f"| {name} | {min(found) * 1e3:.2f} | {median(found) * 1e3:.2f} |")


if __name__ == "__main__":
    main()
