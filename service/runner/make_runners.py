"""Creates the runners that the settings ask for: of each endpoint on every device, or on Ray."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...runtime.errors import InvalidRequest
from .bundle_cache import absolute_bundle
from .devices import runner_devices, runner_names
from .interface import Runner
from .local_runner import LocalRunner
from .ray_cluster import RAY_OPTIONS, check_pool_options, threads_of
from .runner_pool import RunnerPool

if TYPE_CHECKING:
    from ..settings import Settings

_REPLICAS = re.compile(r"(\d+)(?:\.\.(\d+))?")


def make_runners(settings: "Settings") -> list[Runner]:
    """Creates a runner for each endpoint, in their order: processes of this machine, or replicas on a Ray cluster."""
    settings.work.mkdir(parents=True, exist_ok=True)
    names = list(settings.endpoints)
    if settings.pool == "ray":
        return [_ray_pool(settings, name) for name in names]
    devices = runner_devices(settings.devices, settings.runners)
    count = len(devices)
    return [_local_pool(settings, name, devices, count * i, count * len(names)) for i, name in enumerate(names)]


def _local_pool(settings: "Settings", endpoint: str, devices: Sequence[str | None], first: int, total: int) -> Runner:
    """Creates a runner of an endpoint for each device.

    Args:
        settings: the settings.
        endpoint: name of the endpoint.
        devices: as `runner_devices` returns them.
        first: number of the first of these runners among all on the machine.
        total: how many runners of all endpoints share the machine.
    """
    runners = {
        name: LocalRunner(
            pipeline=settings.pipeline,
            bundle=settings.endpoints[endpoint],
            backend=settings.backend,
            precision=settings.precision,
            threads=settings.threads,
            device=device,
            place=place,
            runners=total,
            warm=settings.warm,
            weights=settings.weights.get(endpoint),
            image_pixels=settings.image_pixels,
            step_seconds=settings.step_seconds,
            start_seconds=settings.start_seconds,
            work=settings.work,
        )
        for place, (name, device) in enumerate(zip(runner_names(devices), devices, strict=True), first)
    }
    return RunnerPool(runners)


def _ray_pool(settings: "Settings", endpoint: str) -> Runner:
    from .ray_pool import RayPool  # Ray itself is imported when the pool starts

    options = {
        "bundle": absolute_bundle(settings.endpoints[endpoint]),
        "backend": settings.backend,
        "precision": settings.precision,
        "threads": threads_of(settings.gpus_per_replica, settings.threads),
        "warm": settings.warm,
    }
    others = {name: absolute_bundle(other) for name, other in settings.weights.get(endpoint, {}).items()}
    weights = {"weights": others} if others else {}  # without any, applications keep their name
    return RayPool(
        address=settings.ray_address,
        replicas=parse_replicas(settings.replicas),
        gpus=settings.gpus_per_replica,
        setup={"pipeline": settings.pipeline, "options": options | weights, "image_pixels": settings.image_pixels},
        step_seconds=settings.step_seconds,
        start_seconds=settings.start_seconds,
    )


def parse_replicas(text: str) -> tuple[int, int]:
    """Returns the fewest and the most replicas of `MIN..MAX` or `N`.

    Raises:
        InvalidRequest: it is neither, or not 1 or more and in order.
    """
    match = _REPLICAS.fullmatch(text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise InvalidRequest("replicas", f"{text!r} is not allowed", "give MIN..MAX, such as 1..8, or a number")
    return low, high


def check_pool(settings: "Settings") -> None:
    """Checks the settings of the pool.

    Raises:
        InvalidRequest: one is not allowed, or belongs to the other pool.
    """
    parse_replicas(settings.replicas)
    check_pool_options(settings.pool, {name: getattr(settings, name) for name in RAY_OPTIONS})
    if settings.pool == "local":
        runner_devices(settings.devices, settings.runners)
    elif settings.devices or settings.runners != 1:
        name = "devices" if settings.devices else "runners"
        raise InvalidRequest(name, "not allowed with Ray, which places the replicas", "give replicas")
