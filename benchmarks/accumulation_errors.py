"""Emulates what fp16 accumulators cost: errors of products with the sums of the full-size graphs.

    python benchmarks/accumulation_errors.py

A tensor core multiplies blocks of 16 and adds their sum to an accumulator. Here the block's sum is exact, and an fp16
accumulator is rounded after each block; inputs and results are rounded to their type in every column. Activations and
weights are normal, and results have a standard deviation of 1. The errors are root mean squares, relative to that.
Writes them as JSON into benchmarks/results/.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import reports
from sparsectrl_lcm.runtime.format.weights import convert
from sparsectrl_lcm.runtime.machine import report_head

LAYERS = {
    320: "q/k/v of the first level",
    1280: "q/k/v of the deepest levels",
    2880: "3x3 convolution of 320 channels",
    5760: "3x3 convolution of 640 channels",
    11520: "3x3 convolution of 1280 channels",
    23040: "3x3 convolution of 2560 channels, of an up block",
}
"""Lengths of sums, and a layer that has them."""
BLOCK = 16
COLUMNS = ("fp16, fp32 sums", "fp16, fp16 sums", "bf16, fp32 sums")


def rounded(values: Any, precision: str) -> Any:
    """The values in fp16 or bf16, as fp64."""
    bits = convert(np.ascontiguousarray(values, np.float32), precision)
    if precision == "bf16":
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def fp16_sums(left: Any, right: Any) -> Any:
    """The product of two matrices whose accumulators are rounded to fp16 after each block of 16."""
    result = np.zeros((left.shape[0], right.shape[1]), np.float16)
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        result = (result + left[:, block] @ right[block]).astype(np.float16)
    return result.astype(np.float64)


def errors(length: int, rows: int = 64, columns: int = 64, seed: int = 0) -> dict[str, float]:
    """Root mean square errors of a product [rows, length] x [length, columns] in each type."""
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((rows, length)), random.standard_normal((length, columns)) / length**0.5
    exact = left @ right
    low = [rounded(matrix, "fp16") for matrix in (left, right)]
    short = [rounded(matrix, "bf16") for matrix in (left, right)]
    results = (rounded(low[0] @ low[1], "fp16"), fp16_sums(*low), rounded(short[0] @ short[1], "bf16"))
    return {name: float(np.sqrt(np.mean((result - exact) ** 2))) for name, result in zip(COLUMNS, results, strict=True)}


def table(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A row for each length of sums."""
    yield f"| sum of | layer | {' | '.join(COLUMNS)} |"
    yield "|---" * 5 + "|"
    for length, layer in LAYERS.items():
        yield f"| {length} | {layer} | {' | '.join(f'{error:.1e}' for error in found[str(length)].values())} |"


def main() -> None:
    """Prints the table and writes the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {str(length): errors(length) for length in LAYERS}
    path = reports.results_file("accumulation-errors")
    path.write_text(json.dumps(report_head(reports.command(), ("numpy",)) | {"errors": found}, indent=1) + "\n")
    print("\n".join(table(found)))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
