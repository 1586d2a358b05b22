"""The GPU of this machine, found without creating any object that needs one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError
from .cuda import NO_DRIVER, runtime_api


@dataclass(frozen=True, slots=True)
class Device:
    """An NVIDIA GPU."""

    name: str
    compute_capability: str
    memory: int
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


FP8_SINCE = 8.9
"""The first compute capability with products of fp8: Ada, then Hopper and Blackwell."""


def computes_in_fp8(compute_capability: str) -> bool:
    """Whether GPUs of this compute capability multiply fp8."""
    return float(compute_capability) >= FP8_SINCE


def probe(api: Any = None) -> Device:
    """Device 0.

    Args:
        api: `cuda.bindings.runtime`, or a fake.

    Raises:
        BackendError: the bindings, the driver or the device is missing.
    """
    api = api or runtime_api()
    if not count_gpus(api):
        raise BackendError("backend", "no NVIDIA GPU was found")
    version, properties = _call(api.cudaDriverGetVersion), _call(api.cudaGetDeviceProperties, 0)
    name = properties.name
    return Device(
        name=name.decode().rstrip("\0") if isinstance(name, bytes) else str(name),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory=int(properties.totalGlobalMem),
        driver=_driver_version() or f"for CUDA {version // 1000}.{version % 1000 // 10}",
    )


def count_gpus(api: Any = None) -> int:
    """How many GPUs this process may use. `CUDA_VISIBLE_DEVICES` limits them.

    Args:
        api: `cuda.bindings.runtime`, or a fake.

    Raises:
        BackendError: the bindings or the driver is missing or does not work.
    """
    api = api or runtime_api()
    if not _call(api.cudaDriverGetVersion):
        raise BackendError("backend", NO_DRIVER)
    count: int = _call(api.cudaGetDeviceCount)
    return count


def _call(function: Callable[..., tuple[Any, Any]], *arguments: Any) -> Any:
    try:
        status, value = function(*arguments)
    except RuntimeError as error:  # cuda-bindings raises it if it cannot load a library
        raise BackendError("backend", f"no NVIDIA driver was found ({error})", "install one") from None
    if int(status):
        raise BackendError("backend", f"the NVIDIA driver does not work here: {status.name} ({int(status)})")
    return value


def _driver_version() -> str | None:
    """The version of Linux's kernel module, such as 580.95.05."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word[0].isdigit() and "." in word), None)
