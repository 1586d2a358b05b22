"""Weights of a bundle in the precision of an engine, read from its files by name."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import RootModel

from ..errors import BackendError
from .bundle import Bundle
from .checksums import first_difference
from .manifest import Record

MASK = -1e4
"""What stands for minus infinity in an additive mask: its exp is zero, and fp16 holds it."""


class WeightRecord(Record):
    """Where a weight of an engine lies in its bundle: float32 values in an external-data file."""

    path: str
    offset: int
    shape: tuple[int, ...]
    precision: str


class WeightTable(RootModel[dict[str, WeightRecord]]):
    """The weights of an engine that can be refitted, by name; lies beside the engine."""

    def read(self, bundle: Bundle, name: str) -> NDArray[Any]:
        """A weight as the engine holds it; bfloat16 as the upper halves of float32, uint16.

        Raises:
            BackendError: there is no such weight.
        """
        if name not in self.root:
            raise BackendError("refit", f"the engine wants the weight {name!r}, which is not among those of the bundle")
        record = self.root[name]
        count = int(np.prod(record.shape, dtype=np.int64))
        values = np.memmap(bundle.folder / record.path, np.float32, "r", record.offset, (count,))
        return convert(np.asarray(values), record.precision).reshape(record.shape)


def weight_table_path(engine: Path) -> Path:
    """The file of an engine's weight table."""
    return engine.with_suffix(".weights.json")


def convert(values: NDArray[np.float32], precision: str) -> NDArray[Any]:
    """float32 rounded to the nearest value of a precision, ties to even; bfloat16 as uint16.

    Minus infinity, as masks have it, becomes a number that fp16 holds.
    """
    if values.size and values.min() < -3e38:
        values = np.maximum(values, np.float32(MASK))
    if precision == "fp32":
        return values
    if precision == "fp16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def check_same_graphs(base: Bundle, wanted: Bundle) -> None:
    """Whether the weights of `wanted` fit into engines of `base`.

    Raises:
        BackendError: the bundles have other graphs.
    """
    for graph, record in base.manifest.graphs.items():
        theirs = wanted.manifest.graphs.get(graph)
        ours = base.manifest.files[record.path].sha256
        if theirs is None or wanted.manifest.files[theirs.path].sha256 != ours:
            raise BackendError(
                "refit",
                f"{graph!r} of {str(wanted.folder)!r} is another graph than that of {str(base.folder)!r}",
                "a bundle of the same architecture and release is needed",
            )


def changed_weights(table: WeightTable, graph: str, current: Bundle, wanted: Bundle) -> list[str]:
    """Names of the weights in which an engine that has those of `current` differs from `wanted`.

    Args:
        table: where the engine's weights lie.
        graph: name of the graph, which both bundles have.
        current: the bundle whose weights the engine has.
        wanted: the bundle whose weights it is to get.

    Raises:
        BackendError: the engine cannot be refitted.
    """
    files, others = current.manifest.files, wanted.manifest.files
    changed = {path for path in current.graph(graph).weights if files[path].sha256 != others[path].sha256}
    if changed and not table.root:
        raise BackendError("refit", f"the engine of {graph!r} was built without it", "build it again with --refit")
    return [name for name, record in table.root.items() if record.path in changed]


def check_files(bundle: Bundle, paths: Iterable[str]) -> None:
    """Compares files of a bundle with their checksums again: another motion module may have replaced one.

    Raises:
        BackendError: a file is missing or differs.
    """
    if difference := first_difference(bundle.folder, {path: bundle.manifest.files[path] for path in paths}):
        name, what = difference
        raise BackendError(
            "refit", f"{name!r} in {str(bundle.folder)!r} {what} since the bundle was loaded", "load it again"
        )
