"""What a backend has to provide: the functions of its module, and the executor that they open."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from .checked_request import CheckedRequest
from .cpu.sessions import Array
from .errors import BackendError
from .format.bundle import Bundle
from .format.clip_layout import ClipSize
from .format.engine_keys import ANY_DEVICE, EngineSpec
from .load_options import LoadOptions
from .progress import OnFrames, OnPreview, OnProgress


class OpenGraph(Protocol):
    """One graph of a bundle, open on a backend; takes and returns arrays in the host's memory."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the graph; returns its outputs in order."""

    def close(self) -> None:
        """Frees what only this graph uses."""


class Executor(Protocol):
    """Runs requests, one at a time."""

    backend: str

    @property
    def precision(self) -> str | None:
        """The precision of its engines; None if it depends on the size of a request."""

    def run(
        self,
        request: CheckedRequest,
        on_progress: OnProgress | None,
        on_frames: OnFrames | None = None,
        on_preview: OnPreview | None = None,
    ) -> tuple[Array, dict[str, float]]:
        """Frames uint8 [F, H, W, 3], and seconds per stage; `on_frames` gets every frame once, before this returns.

        `on_preview` is called once for each step. Without it no previews are computed.
        """

    def in_one_piece(self, size: ClipSize) -> bool:
        """Whether it can make clips of this size in one piece, without context windows of fewer frames."""

    def open_graph(self, graph: str, size: ClipSize) -> OpenGraph:
        """Opens one graph for clips of a size, as requests do; `verify` compares it with the portable graph.

        Raises:
            BackendError: its engine is missing, or must not be loaded here.
        """

    def refit(self, weights: Bundle | None) -> None:
        """Takes the weights of another bundle, which `check_refit` allows; None restores those of its own bundle.

        Raises:
            BackendError: this is not possible; it has the weights of its own bundle.
        """

    def check_refit(self, weights: Bundle) -> None:
        """Checks whether requests of the bundle's default size can have the weights of another bundle.

        Raises:
            BackendError: the architectures, tokenizers or schedules differ, or the engines cannot be refitted. Nothing
                has changed.
        """

    def close(self) -> None:
        """Frees all memory; the next request allocates it again."""


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run on this machine.

    Attributes:
        backend: its name.
        version: of its library, if that is installed.
        reason: why it cannot run, and the command that fixes it; None if it can.
        error: the same as an error.
    """

    backend: str
    version: str | None
    reason: str | None = None
    error: BackendError | None = None


class Implementation(Protocol):
    """The functions of a backend's module. `name` distinguishes backends that share a module."""

    def find_version(self, name: str) -> str:
        """The version of the library.

        Raises:
            BackendError: it is missing or broken; the remedy is the command that installs it.
        """

    def check_machine(self, name: str) -> None:
        """Checks whether the library can run on this machine.

        Raises:
            BackendError: it needs a GPU and there is none, it does not know this one, or a part of it cannot be loaded.
        """

    def open_executor(self, name: str, bundle: Bundle, options: LoadOptions) -> Executor:
        """Opens a bundle on this backend.

        Raises:
            BackendError: the backend cannot run here, or not with these options.
        """

    def engine_scope(self, name: str, spec: EngineSpec, version: str) -> tuple[str, str]:
        """The version and device that an engine like `spec` must be bound to in order to load here.

        Raises:
            BackendError: there is no such device here.
        """

    def computes_in(self, precision: str) -> bool:
        """Whether this precision may be chosen if the user names none, because this machine is fast in it."""

    def is_compiled(self, bundle: Bundle, options: LoadOptions, size: ClipSize) -> bool:
        """Whether graphs for clips of a size were compiled before and open at once; if the record `compiles`."""

    def notes(self, found: Availability) -> Iterable[str]:
        """The lines that `doctor` adds."""


def unbound_scope(name: str, spec: EngineSpec, version: str) -> tuple[str, str]:
    """`Implementation.engine_scope` for backends whose engines run on any device, with one version of the library."""
    return version, ANY_DEVICE


def any_machine(name: str) -> None:
    """`Implementation.check_machine` for backends that run on every machine."""


def every_precision(precision: str) -> bool:
    """`Implementation.computes_in` for backends whose precisions are fast on every machine that they run on."""
    return True


def no_notes(found: Availability) -> Iterable[str]:
    """`Implementation.notes` for backends to which `doctor` adds nothing."""
    return ()
