"""A folder with the inputs and outputs of graphs, in Polygraphy's JSON, so that another machine can judge them.

results.json                            what was compared: `Header`
<graph>/inputs/0000000000.json          for `polygraphy run --load-inputs <graph>/inputs`
<graph>/<runner>/0000000000.json        for `polygraphy run --load-outputs <graph>/<runner>`
clip/<runner>/0000000000.json           the frames of whole clips
"""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import load_json, save_json
from pydantic import Field, ValidationError

from ...runtime.cpu.sessions import Array
from ...runtime.errors import BackendError, OutputError, reason_of
from ...runtime.format.bundle import Bundle
from ...runtime.format.clip_layout import ClipSize
from ...runtime.format.engine_keys import graph_checksums
from ...runtime.format.manifest import Record

PORTABLE = "portable"
"""The runner of the portable graphs."""
CLIP = "clip"
"""Stands for a graph where whole clips are compared."""
NOT_REPLAYED = "not replayed"
"""The runner of whole clips that should have been replayed as CUDA graphs, if at least one was not."""
_INPUTS = "inputs"
_HEADER = "results.json"


class EngineRun(Record):
    """The run of a backend's engines.

    Attributes:
        backend: its name.
        version: of its library.
        device: the GPU, or CPU.
        precision: of the engines.
        precisions: of each graph; a graph without an engine runs in fp32.
        runners: the runners of each graph and of whole clips that have finished.
        notes: what was not compared, and why.
    """

    backend: str
    version: str
    device: str
    precision: str
    precisions: dict[str, str]
    runners: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Header(Record):
    """What a folder holds.

    Attributes:
        size: of the clips.
        graphs: checksums of all portable graphs of the bundle and their weights.
        runs: the number of recorded runs of each graph, and of whole clips.
        run: the run of a backend; None if only requests were recorded.
    """

    format: Literal["sparsectrl-lcm-verify-1"] = "sparsectrl-lcm-verify-1"
    size: ClipSize
    graphs: dict[str, tuple[str, ...]]
    runs: dict[str, int] = Field(default_factory=dict)
    run: EngineRun | None = None


class SavedResults:
    """The folder and its header."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        self.header = header

    @classmethod
    def load(cls, folder: Path, bundle: Bundle) -> "SavedResults":
        """Opens a folder that `verify --save` wrote for the bundle.

        Raises:
            BackendError: it is not such a folder, or of another bundle.
        """
        try:
            header = Header.model_validate_json((folder / _HEADER).read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError):
            raise BackendError("load", f"{str(folder)!r} is no folder of results", "name one from --save") from None
        for graph, checksums in header.graphs.items():
            if graph not in bundle.manifest.graphs or graph_checksums(bundle.manifest, graph) != checksums:
                raise BackendError(
                    "load", f"{str(folder)!r} holds results of another bundle", "name the bundle that they are of"
                )
        return cls(folder, header)

    def update(self, **changes: object) -> None:
        """Changes fields of the header and writes it. An interrupted run leaves what has finished by then."""
        self.header = self.header.model_copy(update=changes)
        part = self.folder / f"{_HEADER}.part"
        part.write_text(self.header.model_dump_json(indent=2) + "\n", encoding="utf-8")
        part.replace(self.folder / _HEADER)

    def write_inputs(self, graph: str, index: int, feeds: Mapping[str, Array]) -> None:
        """Saves the inputs of a run."""
        self._save(dict(feeds), self._path(graph, _INPUTS, index))

    def inputs(self, graph: str, index: int) -> dict[str, Array]:
        """The inputs of a run."""
        return dict(self._load(load_json, self._path(graph, _INPUTS, index)))

    def write_outputs(
        self, graph: str, runner: str, index: int, outputs: Mapping[str, Array], seconds: float | None = None
    ) -> None:
        """Saves the outputs of a run."""
        results = RunResults([(runner, [IterationResult(dict(outputs), seconds, runner)])])
        self._save(results, self._path(graph, runner, index))

    def outputs(self, graph: str, runner: str, index: int) -> dict[str, Array]:
        """The outputs of a run."""
        results = self._load(RunResults.load, self._path(graph, runner, index))
        return dict(results[runner][0].items())

    def has(self, graph: str, runner: str) -> bool:
        """Whether all runs of a runner are there."""
        runs = self.header.runs.get(graph, 0)
        return all(self._path(graph, runner, index).is_file() for index in range(runs))

    def copy_recording(self, folder: Path, graphs: Collection[str]) -> "SavedResults":
        """Copies the requests, and what the portable graphs made of them, for the run of another backend."""
        for graph in graphs:
            for part in (_INPUTS, PORTABLE):
                if (self.folder / graph / part).is_dir():
                    shutil.copytree(self.folder / graph / part, folder / graph / part, copy_function=link_or_copy)
        copy = SavedResults(folder, self.header)
        copy.update(run=None)
        return copy

    def _path(self, graph: str, part: str, index: int) -> Path:
        return self.folder / graph / part / f"{index:010d}.json"

    def _save(self, what: object, path: Path) -> None:
        try:
            save_json(what, str(path))
        except OSError as error:
            raise OutputError("save", f"{str(path)!r} cannot be written: {reason_of(error)}") from error

    def _load(self, load: Callable[[str], Any], path: Path) -> Any:
        try:
            return load(str(path))
        except Exception as error:  # Polygraphy, json and numpy raise classes of their own
            raise BackendError("load", f"{str(path)!r} cannot be read: {reason_of(error)}", "save again") from None


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Makes a file appear at another place, without a copy if the file system allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
