"""What `serve --devices` and `--runners` ask for, and what a runner's process takes of the machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime import BackendError, InvalidRequest, operating_system
from sparsectrl_lcm.service.runner import devices
from sparsectrl_lcm.service.runner import pipeline_loading as loading
from sparsectrl_lcm.service.runner.devices import runner_devices, runner_names, take_device
from sparsectrl_lcm.service.settings import Settings


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 2)


@pytest.fixture
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield


@pytest.mark.parametrize(
    ("given", "runners", "expected", "names"),
    [
        ((), 1, [None], ["runner"]),
        ((), 3, [None] * 3, ["runner-0", "runner-1", "runner-2"]),
        (("auto",), 1, ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]),
        (("cuda:1",), 1, ["cuda:1"], ["cuda:1"]),
        (("cuda:1", "cpu", "GPU.1"), 1, ["cuda:1", "cpu", "GPU.1"], ["cuda:1", "cpu", "GPU.1"]),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_one_runner_for_each_device(
    given: tuple[str, ...], runners: int, expected: list[str | None], names: list[str]
) -> None:
    assert runner_devices(given, runners) == expected
    assert runner_names(expected) == names


def test_without_a_gpu_auto_means_the_cpu() -> None:
    assert runner_devices(("auto",), 1) == ["cpu"]


@pytest.mark.parametrize(
    ("given", "runners", "told"),
    [
        (("cuda:2",), 1, "devices: 'cuda:2' is not allowed: this machine has cuda:0, cuda:1; give cuda:N, cpu or auto"),
        (("cuda",), 1, "devices: 'cuda' is not allowed: no NVIDIA GPU was found; give cuda:N, cpu or auto"),
        (("",), 1, "devices: a name is empty; give cuda:N, cpu or auto"),
        (("cuda:0", ""), 1, "devices: a name is empty; give cuda:N, cpu or auto"),
        (("auto", "cuda:1"), 1, "devices: cuda:1 is named twice; each device has one runner"),
        (("cpu",), 2, "runners: not allowed with devices; each device has one runner"),
        ((), 0, "runners: 0 is not allowed; give a whole number from 1 on"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_wrong_devices(given: tuple[str, ...], runners: int, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        runner_devices(given, runners)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("device", "visible", "then", "named"),
    [
        ("cuda:1", None, "1", None),
        ("cuda:1", "4, GPU-5d", "GPU-5d", None),
        ("cpu", "4", "", None),
        ("GPU.1", None, None, "GPU.1"),
        (None, "4", "4", None),
    ],
)
@pytest.mark.usefixtures("environment")
def test_a_process_sees_its_device_only(
    monkeypatch: pytest.MonkeyPatch, device: str | None, visible: str | None, then: str | None, named: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert take_device(device) == named
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == then


@pytest.mark.usefixtures("environment")
def test_a_gpu_that_the_backend_does_not_use_is_refused() -> None:
    with pytest.raises(BackendError) as caught:
        loading.load(None, "onnxruntime", device="cuda:0")
    assert str(caught.value).startswith("devices: onnxruntime, which runs this bundle, does not use cuda:0")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"pool": "nope"}, "pool"),
        ({"replicas": "2..1"}, "replicas"),
        ({"replicas": "2"}, "replicas"),
        ({"runners": 0}, "runners"),
    ],
)
def test_a_wrong_pool_is_refused_before_a_model_loads(tmp_path: Path, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        loading.check_settings(Settings(tmp_path, **settings))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("runners", "taken", "threads"),
    [
        (2, [{1, 2, 9, 10}, {3, 4, 11, 12}], [2, 2]),
        (3, [{1, 9}, {2, 10}, {3, 4, 11, 12}], [1, 1, 2]),
        (5, [{0, 8}, {1, 9}, {2, 10}, {3, 11}, {4, 12}], [1] * 5),
        (6, [None] * 6, [1] * 6),
    ],
)
def test_runners_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, runners: int, taken: list[set[int] | None], threads: list[int]
) -> None:
    """A machine of 8 cores with 2 hardware threads each, of which a container may use 5 cores."""
    fields = {
        "processor": [str(number) for number in range(16)],
        "physical id": ["0"] * 16,
        "core id": [str(number % 8) for number in range(16)],
    }
    usable = {number for number in range(16) if number % 8 < 5}
    chosen: list[set[int] | None] = []
    monkeypatch.setattr(operating_system, "cpu_fields", fields.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: chosen.append(set(cores)))
    monkeypatch.setattr(devices, "physical_cores", lambda: 5)
    found = []
    for place in range(runners):
        before = len(chosen)
        found.append(devices.share_cores(place, runners))
        if len(chosen) == before:
            chosen.append(None)
    assert (chosen, found) == (taken, threads)
