"""The stages of lease.py one by one, without a GPU, and the report of what they wrote."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_worker
import lease_prepare
from fakes.emulated_demo import SMALL, emulated_demo
from lease_bundle import LEFT_OUT, Weight, fill, strip, write_weights
from lease_report import make_report, tables
from lease_stages import device, diffusers_fp16, events, kernels, processes, requests, sources
from lease_stages.processes import Settings
from sparsectrl_lcm.benchmarks import random_pipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.gpu.device import Device
from sparsectrl_lcm.runtime.machine import commit


@pytest.mark.parametrize("broken", ["report_head", "get_device_properties", "cuda_product_rate", "copy_rates"])
def test_a_fact_that_cannot_be_found_out_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    def give(module: Any, name: str, value: Any) -> None:
        def call(*_: Any) -> Any:
            if name == broken:
                raise ValueError("A distribution name is required.")
            return value

        monkeypatch.setattr(module, name, call)

    give(device, "probe", Device("toy", "9.0", 1, "1"))
    give(device.torch.cuda, "is_available", True)
    give(device.torch.cuda, "get_device_properties", None)
    give(device.machine_limits, "cuda_product_rate", {"flops_per_s": 1.0})
    give(device, "copy_rates", [{"copies": {"on_device": 1.0}}])
    give(device, "report_head", {"commit": "abc"})
    rows: list[dict[str, Any]] = []
    device.measure(Settings("device", "", str(tmp_path / "graphs"), ""), rows.append)
    assert rows[0]["device"]["name"] == "toy"
    (missing,) = (row for row in rows if "missing" in row)
    assert missing["why"] == "ValueError: A distribution name is required."
    assert len(rows) == 5
    report = make_report([{"stage": "device", "state": "done", "seconds": 1.0, "rows": rows}])
    assert report["device"]["name"] == "toy"
    assert f"| device: {missing['missing']} | missing |" in "\n".join(tables(report))


def test_copies_on_the_device_are_kept_if_no_host_memory_can_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = device.torch.empty

    def no_locked_memory(*size: int, pin_memory: bool = False, **options: Any) -> Any:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(8, dtype=device.torch.uint8)

    monkeypatch.setattr(device.torch, "empty", no_locked_memory)
    monkeypatch.setattr(device.torch.cuda, "synchronize", lambda: None)
    rows = device.copy_rates()
    assert next(rows)["copies"].keys() == {"on_device"}
    with pytest.raises(RuntimeError, match="out of memory"):
        next(rows)


def test_distributions_without_a_name_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nameless-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = device.head(Settings("device", "", str(tmp_path / "graphs"), ""))
    assert "numpy" in found["versions"]


def test_random_weights_complete_a_bundle_of_graphs_alone(tmp_path: Path) -> None:
    strip(demo_bundle(), tmp_path / "graphs")
    assert sum(file.stat().st_size for file in (tmp_path / "graphs").rglob("*.*")) < 3e6
    nbytes = write_weights(tmp_path / "graphs", tmp_path / "bundle")
    bundle, demo = Bundle.load(tmp_path / "bundle"), Bundle.load()
    assert bundle.manifest.graphs.keys() == demo.manifest.graphs.keys() - set(LEFT_OUT)
    files = [file for record in bundle.manifest.graphs.values() for file in record.weights]
    assert nbytes == sum(demo.manifest.files[file].bytes for file in files)
    for file in files:
        values = np.fromfile(bundle.folder / file, np.float32)
        ours, theirs = (np.nan_to_num(each) for each in (values, np.fromfile(demo.folder / file, np.float32)))
        assert np.count_nonzero(ours) >= 0.99 * np.count_nonzero(theirs), file
        assert 1e-3 < np.abs(ours).max() < 1e2, file
    checksums = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    write_weights(tmp_path / "graphs", tmp_path / "again")
    assert checksums == {name: record.sha256 for name, record in Bundle.load(tmp_path / "again").manifest.files.items()}


def test_the_pieces_of_a_large_weight_differ() -> None:
    block = np.arange(8, dtype=np.float32)
    view = np.zeros(4 * 12, np.uint8)
    fill(view, Weight("file", 0, 12, 1.0), block)
    pieces = [tuple(piece) for piece in view.view(np.float32).reshape(3, 4)]
    assert len(set(pieces)) == 3


def test_results_from_other_code_than_the_prepared_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.prepared_commit(tmp_path) is None
    sources.write_commit(tmp_path, None)
    assert sources.prepared_commit(tmp_path) is None
    sources.write_commit(tmp_path, "abc")
    assert sources.prepared_commit(tmp_path) == "abc"
    (tmp_path / "commit").write_text("abc")  # written by nothing that knew the code
    assert sources.prepared_commit(tmp_path) == "abc-dirty"
    code = tmp_path / "runtime" / "new.py"
    code.parent.mkdir()
    digests = set()
    for text in ("", "x = 1", "x = 2"):
        code.write_text(text)
        digests.add(sources.source_digest(tmp_path))
    assert len(digests) == 3
    monkeypatch.setattr(device, "report_head", lambda *_: {"commit": None})
    assert device.head(Settings("device", "", str(tmp_path / "graphs"), ""))["commit"] == "abc-dirty"


def test_the_commit_alone_is_prepared_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lease_prepare.py", "--only", "commit", "--output", str(tmp_path)])
    lease_prepare.main()
    assert [path.name for path in tmp_path.iterdir()] == ["commit"]
    assert sources.prepared_commit(tmp_path) == commit()


def test_the_most_useful_kernels_come_first() -> None:
    of_device = kernels.Kernels(dry_run=False)
    order = [(kernel.name, kernel.variant) for kernel in of_device]
    assert order.index(("matrix product", "fp8")) < order.index(("spatial attention", "flash"))
    compiled = ["torch.compile" in variant for _, variant in order]
    assert compiled == sorted(compiled)
    assert sum(compiled) == 3


Modes = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Modes:
    """Measures all modes of the request, each with the frames and the facts given for it."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").touch()

    def measured(*found: tuple[int, bool], warning: str = "") -> list[dict[str, Any]]:
        left = iter(found)

        def measure_mode(*_: Any) -> tuple[dict[str, Any], Any]:
            step, replayed = next(left)
            row = {"replayed": replayed, "mode_warning": warning, "samples": {}}
            return row, np.arange(4, dtype=np.uint8) * step

        monkeypatch.setattr(requests, "torch_pipeline", lambda *_, **__: nullcontext())
        monkeypatch.setattr(requests, "measure_mode", measure_mode)
        rows: list[dict[str, Any]] = []
        try:
            requests.measure(Settings("request", "", "", str(tmp_path)), rows.append)
        except RuntimeError as error:
            rows.append({"error": str(error)})
        return rows[1:]

    return measured


def test_a_fault_of_one_mode_costs_no_other(modes: Modes) -> None:
    *rows, last = modes((0, True), (9, False), (9, True))
    assert [row["mode"] for row in rows] == [
        "CUDA graph, channels last",
        "plain, channels last",
        "CUDA graph, channels first",
    ]
    assert [(row["frames_std"] > 1, row["levels_from_first"]) for row in rows] == [(False, 0), (True, 27), (True, 27)]
    assert last["error"] == (
        "CUDA graph, channels last: the frames are of one colour; "
        "plain, channels last: other frames than those of the first mode"
    )
    assert all("mode" in row for row in modes((9, True), (9, False), (8, True)))  # no error


def test_a_mode_whose_graph_was_given_up_is_not_called_a_graph(modes: Modes) -> None:
    *rows, last = modes((9, False), (9, False), (9, True), warning="CUDA graphs failed")
    assert [row["mode"] for row in rows] == [
        "plain for want of a graph, channels last",
        "plain, channels last",
        "CUDA graph, channels first",
    ]
    assert last["error"] == "plain for want of a graph, channels last: CUDA graphs failed"


def test_the_report_has_what_a_killed_stage_measured_and_the_warning_of_a_mode() -> None:
    samples = {kind: {"wall": [1.0, 2.0]} for kind in ("new_keyframes", "second_seed")}
    first = {"mode": None, "load_s": 3.0, "first_s": 70.0}
    whole = first | {"mode": "plain", "samples": samples, "mode_warning": "no graph"} | requests.percentiles(samples)
    killed = [("diffusers-compile", [first]), ("request", [whole])]
    report = make_report([{"stage": name, "state": "killed", "seconds": 9.0, "rows": rows} for name, rows in killed])
    assert report["first_requests"]["diffusers-compile"] == {"load_s": 3.0, "first_s": 70.0}
    text = "\n".join(tables(report))
    assert "| diffusers-compile | - | - | - | - | - | - | 70.0 |" in text
    assert "| torch engines, plain | 1500.0 (1950.0) | 1500.0 (1950.0) | - | - | - | - | 70.0 |" in text
    assert "| torch engines, plain | warning | | no graph |" in text


def test_diffusers_alone_makes_a_report_with_its_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(random_pipeline, "sparsectrl_pipeline", lambda *_: None)
    monkeypatch.setattr(gpu_worker, "sample_diffusers", lambda *_: [])
    settings = Settings("diffusers-eager", "", "", str(tmp_path), dry_run=True)
    diffusers_fp16.measure(settings, rows.append)
    report = make_report([{"stage": "diffusers-eager", "state": "done", "seconds": 1.0, "rows": rows}])
    assert report["request"]["width"] == 64


def emulated(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[dict[str, Any]]:
    """The stage `events` on engines that compute nothing."""
    machine = emulated_demo(SMALL, **options)
    monkeypatch.setattr(events, "torch_pipeline", lambda *_: nullcontext(machine.pipeline))
    rows: list[dict[str, Any]] = []
    events.measure(Settings("events", "", "", "", dry_run=True), rows.append)
    return rows


def test_events_prove_something_only_if_graphs_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["replayed"] for row in emulated(monkeypatch)] == [False, *[True] * 4]
    with pytest.raises(RuntimeError, match="the CUDA graph was not replayed"):
        emulated(monkeypatch, cuda_graphs=False)


def test_a_stage_has_the_time_left_since_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = SimpleNamespace(time=lambda: 1040.0, perf_counter=lambda: 500.0)
    monkeypatch.setattr(processes, "time", clocks)
    settings = Settings("request", "", "", "", seconds=100.0, began=1000.0)
    assert settings.left == 60
    assert settings.deadline(0.85) == pytest.approx(545)
