"""The versions, devices and shapes that TensorRT engines are bound to; errors name the command that rebuilds them."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.tensorrt_builds import H200, RTX_4090, SIZE, TENSORRT, Workshop, small_copy
from fakes.tensorrt_process import GRAPH, Process, one_line
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize
from sparsectrl_lcm.runtime.format.engine_sets import engine_folders
from sparsectrl_lcm.runtime.format.manifest import read_manifest
from sparsectrl_lcm.runtime.gpu.device import Device
from sparsectrl_lcm.runtime.gpu.engine_scope import device_scope
from sparsectrl_lcm.runtime.gpu.tensorrt import TensorRtLoader

H100 = replace(H200, name="NVIDIA H100 PCIe")
A100 = Device("NVIDIA A100-SXM4-80GB", "8.0", 80 << 30, "580.95.05")
RTX_5090 = Device("NVIDIA GeForce RTX 5090", "12.0", 32 << 30, "580.95.05")
T4 = Device("Tesla T4", "7.5", 16 << 30, "580.95.05")
tensorrt_only, tensorrt_11_only, tensorrt_rtx_only = (
    pytest.mark.parametrize("release", releases, scope="module", indirect=True)
    for releases in (TENSORRT, ["11.4"], ["rtx-1.7"])
)


def test_an_engine_of_another_version_is_refused(release: str, built: Path) -> None:
    version = Workshop(release).version
    other = Process(release, built, version=f"{version.rpartition('.')[0]}.999")
    other.refuses(f"was built by version {version}, this machine has {other.workshop.version}")


@tensorrt_only
def test_a_version_compatible_engine_runs_on_later_releases_of_its_major_version(release: str, tmp_path: Path) -> None:
    bundle, builder = small_copy(tmp_path), Workshop(release)
    builder.build(bundle, version_compatible=True)
    first, second, *_ = map(int, builder.version.split("."))
    for later in (None, f"{builder.version}.1", f"{first}.{second + 1}.0.1", f"{first}.{second + 96}"):
        opened = Process(release, bundle, version=later).open()
        names = [name for name, _, _ in opened.workshop.trt.calls]
        allowed = names.index("Runtime.engine_host_code_allowed=")
        assert opened.workshop.calls("Runtime.engine_host_code_allowed=") == [(True,)]
        assert allowed < names.index("Runtime.deserialize_cuda_engine")
    for other in (f"{first}.{second - 1}.99.999", f"{first - 1}.99.0.1", f"{first + 1}.0.0.1"):
        process = Process(release, bundle, version=other)
        process.refuses(rf"was built by version {builder.version}\+, this machine has {other};", "--version-compatible")


def test_code_in_engines_is_not_allowed_without_need(process: Process) -> None:
    assert process.open().workshop.calls("Runtime.engine_host_code_allowed=") == []


@pytest.mark.parametrize("device", [H100, RTX_4090])
def test_an_engine_of_another_device_is_refused(release: str, built: Path, device: Device) -> None:
    process = Process(release, built, device=device)
    if process.workshop.backend == "tensorrt-rtx":
        process.open()  # it is bound to no device
    else:
        process.refuses(rf"was built for NVIDIA H200 \(compute capability 9.0\), this machine has {device.name}")


@pytest.mark.parametrize(
    ("level", "runs", "refused"),
    [
        ("none", [H200], [H100, RTX_4090]),
        ("same-compute-capability", [H200, H100], [RTX_4090, A100, T4]),
        ("ampere-plus", [H200, H100, RTX_4090, A100, RTX_5090], [T4]),
    ],
)
def test_hardware_compatibility_widens_what_an_engine_is_bound_to(
    level: str, runs: list[Device], refused: list[Device]
) -> None:
    bound = device_scope("tensorrt", H200, {"hardware_compatibility": level})
    scopes = {
        device.name: device_scope("tensorrt", device, {"hardware_compatibility": level}) for device in (*runs, *refused)
    }
    assert [name for name, scope in scopes.items() if scope == bound] == [device.name for device in runs]


@tensorrt_11_only
def test_engines_for_ampere_are_not_for_what_came_before(release: str, tmp_path: Path) -> None:
    assert device_scope("tensorrt", T4, {"hardware_compatibility": "ampere-plus"}) == str(T4)
    bundle = small_copy(tmp_path)
    Workshop(release).build(bundle, hardware_compatibility="ampere-plus")
    for device in (A100, RTX_5090):
        Process(release, bundle, device=device).open()
    older = Process(release, bundle, device=T4)
    older.refuses("was built for compute capability 8.0 and above, this machine has Tesla T4")


def test_engines_of_tensorrt_rtx_are_bound_to_the_capabilities_they_were_built_for() -> None:
    assert device_scope("tensorrt-rtx", H200, {}) == device_scope("tensorrt-rtx", None, {}) == "any"
    flags = {"compute_capabilities": "8.9, 12.0"}
    scopes = [device_scope("tensorrt-rtx", device, flags) for device in (None, RTX_4090, RTX_5090)]
    assert scopes == ["8.9, 12.0"] * 3
    assert device_scope("tensorrt-rtx", H200, flags) == str(H200)
    assert device_scope("tensorrt-rtx", replace(H200, compute_capability="2.0"), flags) != scopes[0]


@tensorrt_rtx_only
def test_engines_for_chosen_capabilities_run_on_such_devices_alone(release: str, tmp_path: Path) -> None:
    bundle = small_copy(tmp_path)
    Workshop(release).build(bundle, compute_capabilities=("12.0", "8.9"))
    for device in (RTX_4090, RTX_5090):
        Process(release, bundle, device=device).open()
    for device in (H200, A100):
        other = Process(release, bundle, device=device)
        other.refuses(rf"was built for 8\.9, 12\.0, this machine has {device.name} \(compute capability")


@tensorrt_11_only
def test_an_engine_for_a_compute_capability_runs_on_such_devices(release: str, tmp_path: Path) -> None:
    bundle = small_copy(tmp_path)
    Workshop(release).build(bundle, hardware_compatibility="same-compute-capability")
    Process(release, bundle, device=H100).open()
    stranger = Process(release, bundle, device=RTX_4090)
    stranger.refuses("was built for compute capability 9.0, this machine has .*8.9")


def test_engines_of_another_bundle_are_refused(spoilt: Process) -> None:
    """An export replaces the weights and leaves old engines in place."""
    manifest = read_manifest(spoilt.bundle)
    (weights,) = manifest.graphs[GRAPH].weights
    (others,) = manifest.graphs["text_encoder"].weights
    shutil.copy(spoilt.bundle / others, spoilt.bundle / weights)
    manifest.model_copy(update={"files": manifest.files | {weights: manifest.files[others]}}).write(spoilt.bundle)
    spoilt.refuses("was built from another bundle")


def test_a_damaged_engine_is_refused(spoilt: Process) -> None:
    path = spoilt.folder / f"{GRAPH}.engine"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    spoilt.refuses("differs from its checksum")


def test_an_engine_that_is_gone_is_refused(spoilt: Process) -> None:
    (spoilt.folder / f"{GRAPH}.engine").unlink()
    spoilt.refuses("is missing")


def change_record(process: Process, change: Callable[[dict[str, Any]], None]) -> None:
    path = process.folder / "engines.json"
    index = json.loads(path.read_text())
    change(index["engines"][GRAPH])
    path.write_text(json.dumps(index))


def change_index(process: Process, **changes: Any) -> None:
    change_record(process, lambda record: record["spec"].update(changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"flags": {"optimization_level": 3}}, "does not match the key"),
        ({"conversion": 0}, "was built by another release of sparsectrl-lcm"),
        ({"shapes": {"latents": [4, 4, 16, 16]}}, "was built for other shapes"),
        ({"shapes": {}}, "was built for other shapes"),
        ({"graph": "text_encoder"}, "does not match the key"),
    ],
)
def test_an_index_that_was_changed_is_refused(spoilt: Process, changes: dict[str, Any], reason: str) -> None:
    change_index(spoilt, **changes)
    spoilt.refuses(reason)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({"refit": True}, ["--refit"]),
        ({"strip_weights": True, "tf32": True}, ["--tf32", "--strip-weights"]),
        ({"refit": True, "strip_weights": True}, ["--refit", "--strip-weights"]),
        ({"optimization_level": 5, "aux_streams": 1}, ["--optimization-level 5", "--aux-streams 1"]),
        ({"optimization_level": 0, "workspace": "1.5 GiB"}, ["--optimization-level 0", "--workspace 1.5"]),
        ({"aux_streams": 0, "hardware_compatibility": "none"}, []),
    ],
)
def test_the_command_has_the_options_of_the_engine(spoilt: Process, flags: dict[str, Any], options: list[str]) -> None:
    change_index(spoilt, flags=flags)
    spoilt.refuses("does not match the key", *options)


def test_an_index_cannot_widen_what_an_engine_is_bound_to(spoilt: Process) -> None:
    flags = {"version_compatible": True, "hardware_compatibility": "ampere-plus"}
    change_index(spoilt, flags=flags, version=f"{spoilt.workshop.version}+")
    with pytest.raises(BackendError, match=r"was built for|does not match the key") as error:
        spoilt.open()
    one_line(error, "; run: sparsectrl-lcm build ")
    assert spoilt.workshop.calls("Runtime.deserialize_cuda_engine") == []


def test_an_engine_without_a_record_is_refused(spoilt: Process) -> None:
    path = spoilt.folder / "engines.json"
    index = json.loads(path.read_text())
    del index["engines"][GRAPH]
    path.write_text(json.dumps(index))
    spoilt.refuses(f"'{GRAPH}' is missing")


def test_an_index_that_is_none_is_refused(spoilt: Process) -> None:
    (spoilt.folder / "engines.json").write_text("{")
    spoilt.refuses(r"index '.*engines\.json' cannot be read")


@pytest.mark.parametrize("changes", [{"path": "unet.engine"}, {"files": {}}])
def test_an_engine_without_a_checksum_is_refused(spoilt: Process, changes: dict[str, Any]) -> None:
    change_record(spoilt, lambda record: record.update(changes))
    spoilt.refuses(r"index '.*engines\.json' cannot be read")


@pytest.mark.parametrize("moved", [True, False])
def test_an_index_names_no_files_elsewhere(spoilt: Process, moved: bool) -> None:
    def name_another(record: dict[str, Any]) -> None:
        elsewhere = f"../{spoilt.folder.name}/{GRAPH}.engine"
        record["files"][elsewhere] = record["files"][record["path"]]
        record["path"] = elsewhere if moved else record["path"]

    change_record(spoilt, name_another)
    spoilt.refuses(r"index '.*engines\.json' cannot be read")


def test_of_two_sets_the_later_is_taken(spoilt: Process) -> None:
    """A read-only bundle may contain stale engines that were rebuilt in the user's cache folder."""
    _, outside = engine_folders(spoilt.bundle, spoilt.workshop.backend)
    newer = Path(shutil.copytree(spoilt.folder, outside / spoilt.folder.name))
    (spoilt.folder / f"{GRAPH}.engine").unlink()
    os.utime(spoilt.folder / "engines.json", ns=(1, 10**18))
    os.utime(newer / "engines.json", ns=(1, 10**18 + 1))
    spoilt.open()
    os.utime(newer / "engines.json", ns=(1, 10**18 - 1))
    Process(spoilt.release, spoilt.bundle).refuses("is missing")


def test_engines_of_another_size_are_refused(spoilt: Process) -> None:
    """Engines for other shapes would read and write beyond the ends of their buffers."""
    wanted = ClipSize(width=128, height=64, frames=4)
    shutil.copytree(spoilt.folder, spoilt.workshop.folder(spoilt.bundle, size=wanted))
    other = Process(spoilt.release, spoilt.bundle, wanted)
    with pytest.raises(BackendError, match="belongs to another set") as error:
        other.open()
    one_line(error, f"; run: sparsectrl-lcm build {spoilt.bundle} --backend {spoilt.workshop.backend} --size 128x64 ")
    assert other.workshop.calls("Runtime.deserialize_cuda_engine") == []


def test_an_engine_is_built_for_the_shapes_that_are_wanted(release: str, built: Path) -> None:
    """A later release may decode other parts of a clip."""
    Process(release, built, shapes={"latents": (2, 4, 8, 8)}).refuses("was built for other shapes")


def test_a_size_that_was_not_built_is_refused(process: Process) -> None:
    bundle, wanted = Bundle.load(process.bundle), ClipSize(width=128, height=64, frames=4)
    assert process.loader.keyframe_slots(bundle, SIZE, 3) == 3
    with pytest.raises(BackendError, match="engines for 128x64x4 were not built") as error:
        process.loader.keyframe_slots(bundle, wanted, 0)
    command = f"sparsectrl-lcm build {process.bundle} --backend {process.workshop.backend} --size 128x64 --frames 4"
    assert str(error.value).endswith(f"; run: {command}")
    one_line(error)


@tensorrt_11_only
def test_the_lower_precision_is_preferred(release: str, tmp_path: Path) -> None:
    bundle, found = small_copy(tmp_path), []
    for precision in ("fp32", "bf16", "fp16"):
        Workshop(release).build(bundle, precision=precision)
        found.append(Process(release, bundle).open("text_encoder").engine.dtypes["prompt_embeds"])
    assert found == ["float32", "bfloat16", "float16"]
    chosen = Process(release, bundle)
    chosen.loader = TensorRtLoader(chosen.workshop.library, chosen.device, "bf16")
    assert chosen.loader.precision == "bf16"
    assert chosen.open("text_encoder").engine.dtypes["prompt_embeds"] == "bfloat16", "if it is asked for"


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("fp32", f"fp32 engines for {SIZE} were not built; run: .* --frames {SIZE.frames} --precision fp32$"),
        ("int8", r"precision: 'int8' is unknown to tensorrt\S*; allowed are bf16, fp16, fp32, fp8$"),
    ],
)
def test_a_precision_that_is_not_there_is_refused(process: Process, precision: str, reason: str) -> None:
    loader = TensorRtLoader(process.workshop.library, process.device, precision)
    with pytest.raises(BackendError, match=reason) as error:
        loader.keyframe_slots(Bundle.load(process.bundle), SIZE, 0)
    one_line(error)
