"""The machine, its device, and how fast it multiplies and copies."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import machine_limits
import torch
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.gpu.device import Device, probe
from sparsectrl_lcm.runtime.machine import report_head

from .processes import CannotRun, Row, Settings, Write
from .sources import prepared_commit

COPIED_BYTES = 1 << 30
PROPERTIES = ("multi_processor_count", "L2_cache_size", "shared_memory_per_multiprocessor", "clock_rate")


def measure(settings: Settings, write: Write) -> None:
    """Writes the device first, then each fact about it. A fact that cannot be found out gets the reason instead."""
    device = None if settings.dry_run else usable_device()
    write({"device": device and asdict(device)})
    parts: dict[str, Callable[[], Iterable[Row]]] = {"head": lambda: [{"head": head(settings)}]}
    if device is not None:
        parts |= {"properties": lambda: [properties(device)], "peak": lambda: [peak(device)], "copies": copy_rates}
    for name, rows in parts.items():
        try:
            for row in rows():
                write(row)
        except Exception as error:
            text = str(error).strip().splitlines()
            write({"missing": name, "why": f"{type(error).__name__}: {text[0] if text else ''}"})


def usable_device() -> Device:
    """The device that torch and the CUDA runtime find.

    Raises:
        CannotRun: there is none.
    """
    try:
        device = probe()
    except BackendError as error:
        raise CannotRun(str(error)) from None
    if not torch.cuda.is_available():
        raise CannotRun("this build of torch has no CUDA")
    return device


def head(settings: Settings) -> dict[str, Any]:
    """The head of the report, with the commit of the preparation if the source tree has none."""
    names = (item.name for item in distributions() if item.metadata and "Name" in item.metadata)
    found = report_head("python benchmarks/lease.py", names)
    if found["commit"] is None:
        found["commit"] = prepared_commit(Path(settings.graphs).parent)
    return found


def properties(device: Device) -> Row:
    """What torch knows about the device."""
    found = torch.cuda.get_device_properties(0)
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    more = {name: getattr(found, name, None) for name in PROPERTIES}
    return {"device": asdict(device) | more, "libraries": libraries}


def peak(device: Device) -> Row:
    """Operations per second, measured and from the data sheet."""
    return {"peak": machine_limits.cuda_product_rate() | {"data_sheet": machine_limits.data_sheet_peak(device.name)}}


def copy_rates() -> Iterator[Row]:
    """Bytes per second: read and written on the device, then also from page-locked host memory to the device and back.

    The second row holds the first one's, too.
    """
    device = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(device)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        return COPIED_BYTES / machine_limits.best_seconds(copy)

    rates = {"on_device": 2 * rate(other, device)}
    yield {"copies": rates}
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    yield {"copies": rates | {"to_device": rate(device, host), "from_device": rate(host, device)}}
