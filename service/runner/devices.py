"""The devices that `serve --devices` and `--runners` ask for, and how a runner's process takes its own."""

import os
import re
from collections.abc import Sequence

from ...runtime.errors import BackendError, InvalidRequest
from ...runtime.gpu.device import count_gpus
from ...runtime.machine import physical_cores
from ...runtime.operating_system import take_cores

_CUDA = re.compile(r"cuda:(\d{1,3})")
CPU = "cpu"
VISIBLE = "CUDA_VISIBLE_DEVICES"


def runner_devices(devices: Sequence[str], runners: int) -> list[str | None]:
    """Returns the device of each runner; None leaves the choice to the backend.

    Args:
        devices: `cuda:N`, `cpu` or OpenVINO's name of a device, one for each runner; `auto` stands for every NVIDIA
            GPU, or for the CPU on a machine without one. Empty means `runners` runners that share the machine.
        runners: how many runners share the machine if no devices are given.

    Raises:
        InvalidRequest: `runners` is not allowed, a device is named twice, or there is no such GPU.
    """
    if runners < 1:
        raise InvalidRequest("runners", f"{runners} is not allowed", "give a whole number from 1 on")
    if not devices:
        return [None] * runners
    if runners != 1:
        raise InvalidRequest("runners", "not allowed with devices", "each device has one runner")
    gpus = _count_gpus() if any(name == "auto" or _CUDA.fullmatch(name) for name in devices) else 0
    every = [f"cuda:{number}" for number in range(gpus)] or [CPU]
    chosen = [name for given in devices for name in (every if given == "auto" else [given])]
    for place, name in enumerate(chosen):
        cuda = _CUDA.fullmatch(name)
        if not name:
            raise InvalidRequest("devices", "a name is empty", "give cuda:N, cpu or auto")
        if name in chosen[:place]:
            raise InvalidRequest("devices", f"{name} is named twice", "each device has one runner")
        if name.startswith("cuda") and (cuda is None or int(cuda[1]) >= gpus):
            there_are = f"this machine has {', '.join(every)}" if gpus else "no NVIDIA GPU was found"
            raise InvalidRequest("devices", f"{name!r} is not allowed: {there_are}", "give cuda:N, cpu or auto")
    return list(chosen)


def runner_names(devices: Sequence[str | None]) -> list[str]:
    """Returns the name of each runner in logs, metrics and `/readyz`: its device, or a number."""
    return [device or (f"runner-{place}" if len(devices) > 1 else "runner") for place, device in enumerate(devices)]


def take_device(device: str | None) -> str | None:
    """Limits this process to its device, before a library looks for GPUs. Returns OpenVINO's name of it, if any."""
    if device is None:
        return None
    if device == CPU:
        os.environ[VISIBLE] = ""
        return None
    if (cuda := _CUDA.fullmatch(device)) is None:
        return device
    number = int(cuda[1])
    visible = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = cuda[1] if visible is None else visible.split(",")[number].strip()
    return None


def has_own_name(device: str) -> bool:
    """Whether a device has a name of a backend's own, such as OpenVINO's `GPU`."""
    return device not in ("auto", CPU) and not is_cuda(device)


def is_cuda(device: str | None) -> bool:
    """Whether a device is an NVIDIA GPU."""
    return device is not None and _CUDA.fullmatch(device) is not None


def uses_gpu(device: str | None) -> bool:
    """Whether a runner on a device, as `runner_devices` returns it, may use an NVIDIA GPU."""
    return _count_gpus() > 0 if device is None else is_cuda(device)


def share_cores(place: int, runners: int) -> int:
    """Takes this process's share of the machine's cores and leaves one physical core to the server.

    Args:
        place: number of this runner, from 0.
        runners: how many runners compute on the CPU.

    Returns:
        The threads to compute with.
    """
    if runners == 1:
        return max(1, physical_cores() - 1)
    cores = take_cores(place, runners, spare=1)
    return max(1, cores or (physical_cores() - 1) // runners)


def _count_gpus() -> int:
    try:
        return count_gpus()
    except BackendError:
        return 0
