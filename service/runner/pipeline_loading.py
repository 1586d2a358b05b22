"""Loads the pipeline in the runner's process, and checks its options in the server's process."""

from pathlib import Path

from ...runtime import InvalidRequest, VideoPipeline
from ...runtime.backends import BACKENDS, choose_backend, find_backend
from ...runtime.format.bundle import Bundle, bundle_folder
from ...runtime.format.manifest import read_manifest
from ...runtime.load_options import LoadOptions
from ...runtime.machine import physical_cores
from ..protocol.clip_input import LAST


def load(
    bundle: str | None = None, backend: str = "auto", precision: str | None = None, threads: int | None = None
) -> VideoPipeline:
    """Loads as `VideoPipeline.load` does, but on the CPU leaves one core to the server unless `threads` is given.

    If a clip uses every core, 100 polling clients nearly double its time; one free core prevents that
    (`benchmarks/polling.py`).
    """
    if backend == "auto":
        backend = choose_backend(Bundle.load(bundle), LoadOptions(precision=precision))
    if threads is None and not BACKENDS[backend].on_gpu:
        threads = max(1, physical_cores() - 1)
    return VideoPipeline.load(bundle, backend, precision=precision, threads=threads)


def check(bundle: Path | None, backend: str, threads: int | None) -> None:
    """Checks the options in the server's process, without the model. The runner's process finds other errors on load.

    Raises:
        InvalidRequest, BackendError, BundleError: an option is wrong.
    """
    LoadOptions(threads=threads)
    if backend != "auto":
        find_backend(backend, "auto")
    frames = read_manifest(bundle_folder(bundle)).sizes.frames
    if frames != LAST + 1:
        reason = f"its clips have {frames} frames, the endpoint's {LAST + 1}"
        raise InvalidRequest("bundle", reason, f"export one with {LAST + 1} frames")
