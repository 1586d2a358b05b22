"""Keeps TensorRT's kernel timings on a device beside the engines, for the next build."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from ...runtime.format.engine_sets import writable_engine_folder
from ...runtime.gpu.device import Device
from ...runtime.gpu.tensorrt_library import Library


class TimingCache:
    """One file per device and version, written after each graph, so that a stopped build keeps its timings.

    Args:
        bundle: the bundle's folder.
        library: TensorRT; TensorRT-RTX times nothing.
        device: the GPU, or None.
    """

    def __init__(self, bundle: Path, library: Library, device: Device | None) -> None:
        self._cache: Any = None
        self._bundle = bundle
        self._backend = library.backend
        self._path: Path | None = None
        self._name = ""
        if device is not None and not library.is_rtx:
            self._name = f"timing-{library.version}-{device.name}-{device.compute_capability}.cache".replace(" ", "-")

    def attach(self, config: Any) -> None:
        """Gives the known timings to a build.

        Raises:
            OSError: there is no folder for engines.
        """
        if not self._name:
            return
        self._path = writable_engine_folder(self._bundle, self._backend) / self._name
        known = memoryview(self._cache.serialize()) if self._cache is not None else b""
        with suppress(OSError):
            known = known or self._path.read_bytes()
        cache = config.create_timing_cache(known) or config.create_timing_cache(b"")  # the file may be damaged
        config.set_timing_cache(cache, ignore_mismatch=False)

    def detach(self, config: Any) -> None:
        """Takes the timings of a build and writes them."""
        if self._path is not None:
            self._cache = config.get_timing_cache()
            part = self._path.with_suffix(".part")
            try:
                part.write_bytes(memoryview(self._cache.serialize()))
                part.replace(self._path)
            except OSError:
                with suppress(OSError):
                    part.unlink()
