"""The machine, its device, and how fast it multiplies and copies."""

from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import machine_limits
import torch
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.gpu.device import probe
from sparsectrl_lcm.runtime.machine import report_head

from .processes import CannotRun, Settings, Write

COPIED_BYTES = 1 << 30
PROPERTIES = ("multi_processor_count", "L2_cache_size", "shared_memory_per_multiprocessor", "clock_rate")


def measure(settings: Settings, write: Write) -> None:
    """Writes the head of the report first, then each rate."""
    head = report_head("python benchmarks/lease.py", (item.name for item in distributions()))
    prepared = Path(settings.graphs).parent / "commit"
    if head["commit"] is None and prepared.exists():
        head["commit"] = prepared.read_text() or None
    write({"head": head})
    if settings.dry_run:
        write({"device": None})
        return
    try:
        device = asdict(probe())
    except BackendError as error:
        raise CannotRun(str(error)) from None
    if not torch.cuda.is_available():
        raise CannotRun("this build of torch has no CUDA")
    found = torch.cuda.get_device_properties(0)
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    write({"device": device | {name: getattr(found, name, None) for name in PROPERTIES}, "libraries": libraries})
    write({"peak": machine_limits.cuda_product_rate() | {"data_sheet": machine_limits.data_sheet_peak(device["name"])}})
    write({"copies": copy_rates()})


def copy_rates() -> dict[str, Any]:
    """Bytes per second: read and written on the device, and from page-locked host memory to the device and back."""
    device = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(device)
    host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        return COPIED_BYTES / machine_limits.best_seconds(copy)

    return {"on_device": 2 * rate(other, device), "to_device": rate(device, host), "from_device": rate(host, device)}
