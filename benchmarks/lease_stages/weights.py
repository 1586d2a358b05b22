"""Writes the weights of the full-size bundle; in a dry run those of the demo bundle."""

import time
from pathlib import Path

from lease_bundle import strip, write_weights
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle

from .processes import CannotRun, Settings, Write


def measure(settings: Settings, write: Write) -> None:
    """Writes the seconds of the weights, and those of their verification."""
    graphs = Path(settings.graphs)
    if settings.dry_run:
        graphs = Path(settings.work) / "graphs"
        if not graphs.exists():
            strip(demo_bundle(), graphs)
    elif not (graphs / "manifest.json").exists():
        raise CannotRun("there are no graphs; run before: python benchmarks/lease_prepare.py")
    begin = time.perf_counter()
    nbytes = write_weights(graphs, settings.bundle)
    seconds = time.perf_counter() - begin
    write({"weights_s": seconds, "bytes": nbytes})
    begin = time.perf_counter()
    Bundle.load(settings.bundle)
    write({"verified_s": time.perf_counter() - begin})
