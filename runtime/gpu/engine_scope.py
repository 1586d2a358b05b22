"""The scope of a GPU engine: the version of its backend and the device or class of devices that it is bound to."""

from collections.abc import Mapping
from typing import Any

from ..format.engine_keys import ANY_DEVICE
from .device import Device
from .tensorrt_library import RTX


def device_scope(backend: str, device: Device | None, flags: Mapping[str, Any]) -> str:
    """The scope of an engine with these options: the device, a class that the device belongs to, or any."""
    if backend == RTX:
        capabilities = str(flags.get("compute_capabilities", ""))
        if device is not None and capabilities and device.compute_capability not in capabilities.split(", "):
            return str(device)
        return capabilities or ANY_DEVICE
    assert device is not None
    level = flags.get("hardware_compatibility", "none")
    if level == "ampere-plus" and float(device.compute_capability) >= 8:
        return "compute capability 8.0 and above"
    if level == "same-compute-capability":
        return f"compute capability {device.compute_capability}"
    return str(device)


def version_scope(version: str, flags: Mapping[str, Any], built: str | None = None) -> str:
    """The version that an engine with these options is bound to.

    Args:
        version: the backend's version on this machine.
        flags: options of the builder.
        built: the version in the engine's record; None while the engine is being built.
    """
    if not flags.get("version_compatible"):
        return version
    if built is None:
        return f"{version}+"
    here, there = (_numbers(text.removesuffix("+")) for text in (version, built))
    return built if here[:1] == there[:1] and here >= there else version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
