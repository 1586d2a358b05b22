"""A folder with the inputs and outputs of graphs, in Polygraphy's JSON, so that another machine can judge them.

results.json                            what was compared: `Header`
<graph>/inputs/0000000000.json          for `polygraphy run --load-inputs <graph>/inputs`
<graph>/<runner>/0000000000.json        for `polygraphy run --load-outputs <graph>/<runner>`
clip/<runner>/0000000000.json           the frames of whole clips
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import load_json, save_json
from pydantic import ValidationError

from ...runtime.cpu.sessions import Array
from ...runtime.errors import BackendError, InvalidRequest, OutputError, reason_of
from ...runtime.format.bundle import Bundle
from ...runtime.format.engine_keys import graph_checksums
from ...runtime.format.temporary_folders import created_folder
from .header import PORTABLE, Header
from .interruptions import check_stopped

_INPUTS = "inputs"
_HEADER = "results.json"
_LONGEST = 300
"""Characters of a library's message that are shown; some of them quote whole files."""


class SavedResults:
    """The folder and its header."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        self.header = header

    @classmethod
    def load(cls, folder: Path, bundle: Bundle) -> "SavedResults":
        """Opens a folder that `verify --save` wrote for the bundle.

        Raises:
            BackendError: it is not such a folder, of another bundle, or its header is damaged.
        """
        try:
            header = Header.model_validate_json((folder / _HEADER).read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError):
            raise BackendError("load", f"{str(folder)!r} is no folder of results", "name one from --save") from None
        if header.graphs != {graph: graph_checksums(bundle.manifest, graph) for graph in bundle.manifest.graphs}:
            raise BackendError(
                "load", f"{str(folder)!r} holds results of another bundle", "name the bundle that they are of"
            )
        for fault in header.faults(bundle):
            raise BackendError("load", f"{str(folder / _HEADER)!r} is damaged: {cut(fault)}", "save again")
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

    def inputs(self, graph: str, index: int, names: Collection[str] | None = None) -> dict[str, Array]:
        """The inputs of a run.

        Args:
            graph: name of the graph.
            index: number of the run.
            names: what the file must hold; None allows anything.

        Raises:
            BackendError: the file cannot be read, or holds something else.
        """
        return self._arrays(load_json, self._path(graph, _INPUTS, index), names)

    def write_outputs(
        self, graph: str, runner: str, index: int, outputs: Mapping[str, Array], seconds: float | None = None
    ) -> None:
        """Saves the outputs of a run."""
        results = RunResults([(runner, [IterationResult(dict(outputs), seconds, runner)])])
        self._save(results, self._path(graph, runner, index))

    def outputs(self, graph: str, runner: str, index: int, names: Collection[str] | None = None) -> dict[str, Array]:
        """The outputs of a run; see `inputs`."""

        def load(path: str) -> Any:
            return RunResults.load(path)[runner][0].items()

        return self._arrays(load, self._path(graph, runner, index), names)

    def has(self, graph: str, runner: str) -> bool:
        """Whether all runs of a runner are there."""
        runs = self.header.runs.get(graph, 0)
        return all(self._path(graph, runner, index).is_file() for index in range(runs))

    def copy_recording(self, folder: Path, graphs: Collection[str]) -> "SavedResults":
        """Copies the requests, and what the portable graphs made of them, for the run of another backend."""
        try:
            for graph in graphs:
                for part in (_INPUTS, PORTABLE):
                    if (self.folder / graph / part).is_dir():
                        shutil.copytree(self.folder / graph / part, folder / graph / part, copy_function=link_or_copy)
        except OSError as error:  # shutil's own names every file
            raise OutputError("save", f"{str(folder)!r} cannot be written: {cut(reason_of(error))}") from error
        copy = SavedResults(folder, self.header)
        copy.update(run=None, runs={graph: self.header.runs[graph] for graph in graphs})
        return copy

    def _path(self, graph: str, part: str, index: int) -> Path:
        return self.folder / graph / part / f"{index:010d}.json"

    def _save(self, what: object, path: Path) -> None:
        try:
            save_json(what, str(path))
        except OSError as error:
            raise OutputError("save", f"{str(path)!r} cannot be written: {reason_of(error)}") from error
        check_stopped()

    def _arrays(self, load: Callable[[str], Any], path: Path, names: Collection[str] | None) -> dict[str, Array]:
        """Reads arrays by name, and checks that they are what was saved."""
        try:
            found = dict(load(str(path)))
        except Exception as error:  # Polygraphy, json and numpy raise classes of their own
            check_stopped()
            raise BackendError("load", f"{str(path)!r} cannot be read: {cut(reason_of(error))}", "save again") from None
        check_stopped()
        if names is not None and found.keys() != set(names):
            holds = cut(f"{', '.join(map(str, found)) or 'nothing'} instead of {', '.join(names)}")
            raise BackendError("load", f"{str(path)!r} holds {holds}", "save again")
        for name, array in found.items():
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or not array.size:
                raise BackendError("load", f"{str(path)!r} has no numbers for {cut(repr(name))}", "save again")
        return found


@contextmanager
def output_folder(save: Path | None, load: Path | None) -> Iterator[Path]:
    """The folder to save in, which is new or empty, or a temporary one.

    Args:
        save: the folder; None for a temporary one.
        load: a folder of results that are copied into it.

    Raises:
        InvalidRequest: `save` is inside `load`, which would be copied into itself.
        OutputError: it cannot be written, or is not empty.
    """
    if save is None:
        with tempfile.TemporaryDirectory(prefix="sparsectrl-lcm-") as folder:
            yield Path(folder)
        return
    with ExitStack() as stack:
        try:
            if load is not None and any(load.samefile(parent) for parent in save.resolve().parents if parent.exists()):
                raise InvalidRequest("save", f"{str(save)!r} is inside the loaded folder", "name a folder elsewhere")
            stack.enter_context(created_folder(save))
            full = any(save.iterdir())
        except OSError as error:
            raise OutputError("save", f"{str(save)!r} cannot be written: {reason_of(error)}") from None
        if full:
            raise OutputError("save", f"{str(save)!r} is not empty", "name a new folder")
        yield save


def cut(text: str) -> str:
    """The beginning of a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Makes a file appear at another place, without a copy if the file system allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
