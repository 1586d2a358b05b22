"""Weights of a bundle, read by name from its files in an engine's precision."""

from collections.abc import Iterable
from math import prod
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
"""Replaces minus infinity in additive masks: its exp is zero, and fp16 can represent it."""


class WeightRecord(Record):
    """The place of an engine's weight in the bundle: float32 values in an external-data file."""

    path: str
    offset: int
    shape: tuple[int, ...]
    precision: str


class WeightTable(RootModel[dict[str, WeightRecord]]):
    """The weights of a refittable engine, by name; stored beside the engine."""

    def read(self, bundle: Bundle, name: str) -> NDArray[Any]:
        """A weight in the engine's precision; bfloat16 as uint16, the upper halves of float32.

        Raises:
            BackendError: there is no such weight.
        """
        if name not in self.root:
            raise BackendError("refit", f"the engine needs the weight {name!r}, which the bundle does not have")
        record = self.root[name]
        count = int(np.prod(record.shape, dtype=np.int64))
        values = np.memmap(bundle.folder / record.path, np.float32, "r", record.offset, (count,))
        return convert(np.asarray(values), record.precision).reshape(record.shape)


def read_weight(path: str | Path, dtype: Any, offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """A weight in an external-data file: the values of a numpy type from this byte on."""
    return np.fromfile(path, dtype, prod(shape), offset=offset).reshape(shape)


def weight_table_path(engine: Path) -> Path:
    """The file of an engine's weight table."""
    return engine.with_suffix(".weights.json")


def convert(values: NDArray[np.float32], precision: str) -> NDArray[Any]:
    """float32 rounded to the nearest value of a precision, ties to even; bfloat16 as uint16.

    Minus infinity, which occurs in masks, becomes `MASK`, which fp16 can represent.
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
    """Checks that the weights of `wanted` fit into the engines of `base`.

    Raises:
        BackendError: graphs, tokenizers or schedules of the two bundles differ: weights alone would give other clips
            than `wanted` does.
    """
    for graph, record in base.manifest.graphs.items():
        theirs = wanted.manifest.graphs.get(graph)
        ours = base.manifest.files[record.path].sha256
        if theirs is None or wanted.manifest.files[theirs.path].sha256 != ours:
            raise BackendError(
                "refit",
                f"{graph!r} of {str(wanted.folder)!r} is not the same graph as that of {str(base.folder)!r}",
                "take a bundle of the same architecture and release",
            )
    tokenizers = {item.manifest.files[item.manifest.tokenizer].sha256 for item in (base, wanted)}
    if len(tokenizers) > 1 or base.manifest.scheduler != wanted.manifest.scheduler:
        differs = "tokenizer" if len(tokenizers) > 1 else "schedule"
        raise BackendError("refit", f"{str(wanted.folder)!r} has another {differs}", "load that bundle instead")


def changed_graphs(current: Bundle, wanted: Bundle) -> list[str]:
    """Names of the graphs whose weights differ between two bundles with the same graphs."""
    return [graph for graph in current.manifest.graphs if _changed_files(graph, current, wanted)]


def changed_weights(table: WeightTable, graph: str, current: Bundle, wanted: Bundle) -> list[str]:
    """Names of the weights to replace in an engine that has those of `current` and is to get those of `wanted`.

    Args:
        table: the engine's weights.
        graph: name of the graph, which both bundles have.
        current: the bundle whose weights the engine has.
        wanted: the bundle whose weights it will get.

    Raises:
        BackendError: the engine cannot be refitted.
    """
    changed = _changed_files(graph, current, wanted)
    if changed and not table.root:
        raise BackendError("refit", f"the engine of {graph!r} was built without refit", "build it again with refit")
    return [name for name, record in table.root.items() if record.path in changed]


def _changed_files(graph: str, current: Bundle, wanted: Bundle) -> set[str]:
    files, others = current.manifest.files, wanted.manifest.files
    return {path for path in current.graph(graph).weights if files[path].sha256 != others[path].sha256}


def check_files(bundle: Bundle, paths: Iterable[str], field: str = "refit") -> None:
    """Verifies files of a bundle again, since another motion module may have replaced one.

    Args:
        bundle: the bundle.
        paths: names of the files.
        field: of the error.

    Raises:
        BackendError: a file is missing or differs.
    """
    if difference := first_difference(bundle.folder, {path: bundle.manifest.files[path] for path in paths}):
        name, what = difference
        raise BackendError(
            field, f"{name!r} in {str(bundle.folder)!r} {what} since the bundle was loaded", "load it again"
        )
