"""How the runner's process opens a pipeline."""

from pathlib import Path

from ..runtime import InvalidRequest, VideoPipeline
from ..runtime.backends import BACKENDS, LoadOptions, check_backend, choose_backend
from ..runtime.format.bundle import Bundle, bundle_folder
from ..runtime.format.manifest import read_manifest
from ..runtime.machine import physical_cores
from .schema import LAST


def load(
    bundle: str | None = None, backend: str = "auto", precision: str | None = None, threads: int | None = None
) -> VideoPipeline:
    """As `VideoPipeline.load`, but on the CPU one core is left to the server unless `threads` are given.

    Where a clip takes every core, 100 clients that ask for its state make it take nearly twice as long; one core that
    is left makes up for it (`benchmarks/polling.py`).
    """
    if backend == "auto":
        backend = choose_backend(Bundle.load(bundle), LoadOptions(precision=precision))
    if threads is None and not BACKENDS[backend].on_gpu:
        threads = max(1, physical_cores() - 1)
    return VideoPipeline.load(bundle, backend, precision=precision, threads=threads)


def check(bundle: Path | None, backend: str, threads: int | None) -> None:
    """Refuses what is wrong at a glance, in the server's own process; the runner's tells the rest when it loads.

    Raises:
        InvalidRequest, BackendError, BundleError: as `load` does.
    """
    LoadOptions(threads=threads)
    check_backend(backend)
    frames = read_manifest(bundle_folder(bundle)).sizes.frames
    if frames != LAST + 1:
        told = f"bundle: its clips have {frames} frames, the endpoint's {LAST + 1}"
        raise InvalidRequest(f"{told}; export one with --frames {LAST + 1}")
