"""Folders of results that are judged again: damaged, interrupted, contradicted by options; and Ctrl-C meanwhile.

The results are random numbers. No graph runs.
"""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_engines import SIZE
from polygraphy.json import serde
from polygraphy.mod import lazy_import
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine.verify.header import CLIP, EngineRun, Header
from sparsectrl_lcm.engine.verify.interruptions import stoppable
from sparsectrl_lcm.engine.verify.saved_results import SavedResults, cut
from sparsectrl_lcm.engine.verify.verify import VerifyOptions, verify
from sparsectrl_lcm.runtime import BackendError, InvalidRequest
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.engine_keys import graph_checksums

RUNS = {"vae_encoder": 0, "lcm_update": 2, "vae_decoder": 1, CLIP: 1}
RUNNERS: dict[str, tuple[str, ...]] = {
    "vae_encoder": (),
    "lcm_update": ("runtime", "library"),
    "vae_decoder": ("runtime",),
    CLIP: ("plain",),
}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(demo_bundle())


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Path:
    """Results that pass; no request has run the VAE's encoder."""
    checksums = {graph: graph_checksums(bundle.manifest, graph) for graph in bundle.manifest.graphs}
    made = EngineRun(
        backend="tensorrt",
        version="11.4",
        device="H200",
        precision="fp16",
        precisions={},
        unfinished=(),
        runners=RUNNERS,
    )
    (tmp_path / "results").mkdir()
    results = SavedResults(tmp_path / "results", Header(size=SIZE, graphs=checksums, runs=RUNS, run=made))
    results.update()
    generator = np.random.default_rng(0)
    for graph, runs in RUNS.items():
        for index in range(runs):
            record = None if graph == CLIP else bundle.graph(graph)
            outputs = ["frames"] if record is None else [item.name for item in record.outputs]
            values = {name: generator.standard_normal(8) for name in outputs}
            for runner in ("portable", *RUNNERS[graph]):
                results.write_outputs(graph, runner, index, values)
            if record is not None:
                results.write_inputs(graph, index, {item.name: generator.standard_normal(8) for item in record.inputs})
    return results.folder


def edit(saved: Path, **changes: Any) -> None:
    """Changes fields of the header; `run__backend` is `backend` of `run`."""
    path = saved / "results.json"
    header = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, field = name.split("__")
        place = header
        for parent in parents:
            place = place[parent]
        place[field] = value
    path.write_text(json.dumps(header))


def test_intact_results_pass(bundle: Bundle, saved: Path) -> None:
    report = verify(bundle, VerifyOptions(load=saved))
    assert report.passed
    assert {row.graph: row.runs for row in report.rows} == {"lcm_update": 2, "vae_decoder": 1, "clip": 1}


# Damage


HEADERS = [
    ({"runs": {}}, "it has no runs"),
    ({"runs__lcm_update": 0}, "it has runners of 'lcm_update', but no runs"),
    ({"runs__clip": 0}, "it has no runs of whole clips"),
    ({"runs__lcm_update": -1}, "is no folder of results"),
    ({"runs__../../secret": 1}, "it has runs of '../../secret', which is not in the bundle"),
    ({"graphs": {}}, "holds results of another bundle"),
    ({"graphs__unet": ["0" * 64]}, "holds results of another bundle"),
    ({"size__width": 0}, "its clips are of 0x32x2"),
    ({"run__backend": "foo"}, "its backend 'foo' is unknown"),
    ({"run__backend": "foo" * 9999}, "its backend 'foofoofoo"),
    ({"run__precision": "fp4"}, "there are no bounds for fp4"),
    ({"run__runners__lcm_update": ["portable"]}, "the runner 'portable' of 'lcm_update' is unknown"),
    ({"run__runners__clip": ["runtime"]}, "the runner 'runtime' of 'clip' is unknown"),
    ({"run__runners__unet": ["runtime"]}, "it has runners of 'unet', but no runs"),
]


@pytest.mark.parametrize(("changes", "message"), HEADERS, ids=[message for _, message in HEADERS])
def test_a_damaged_header_is_one_line(
    bundle: Bundle, saved: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    edit(saved, **changes)
    fails(bundle, saved, capsys, message)


def test_a_damaged_file_is_one_line(bundle: Bundle, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved / "lcm_update/runtime/0000000001.json"
    outputs = [item.name for item in bundle.graph("lcm_update").outputs]
    results = SavedResults.load(saved, bundle)
    shutil.copy(saved / "vae_decoder/runtime/0000000000.json", path)
    fails(bundle, saved, capsys, f"holds frames instead of {outputs[0]}, {outputs[1]}")
    results.write_outputs("lcm_update", "runtime", 1, {})
    fails(bundle, saved, capsys, f"holds nothing instead of {outputs[0]}, {outputs[1]}")
    for values in (np.zeros(0), np.array(["a"])):
        results.write_outputs("lcm_update", "runtime", 1, dict.fromkeys(outputs, values))
        fails(bundle, saved, capsys, f"has no numbers for '{outputs[0]}'")
    shutil.copy(saved / "lcm_update/library/0000000001.json", path)
    fails(bundle, saved, capsys, "cannot be read: .*runtime .*does not exist")
    results.write_inputs("lcm_update", 1, {"latents": np.random.default_rng(0).standard_normal(999)})
    shutil.copy(saved / "lcm_update/inputs/0000000001.json", path)
    fails(bundle, saved, capsys, "cannot be read: .*RunResults")
    path.write_text(path.read_text()[:99])
    fails(bundle, saved, capsys, "cannot be read: ")
    path.unlink()
    fails(bundle, saved, capsys, "cannot be read: ")


def test_inputs_of_another_graph_are_one_line(bundle: Bundle, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(saved / "vae_decoder/inputs/0000000000.json", saved / "lcm_update/inputs/0000000000.json")
    fails(bundle, saved, capsys, "holds latents instead of", "--backend", "onnxruntime", "--graph", "lcm_update")


def fails(bundle: Bundle, saved: Path, capsys: pytest.CaptureFixture[str], message: str, *options: str) -> None:
    assert run(["verify", str(bundle.folder), "--load", str(saved), *options]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --load: ") or "no bounds" in line, line
    assert re.search(message, line), line
    assert len(line) < 800


def test_results_of_another_bundle_are_refused(bundle: Bundle, saved: Path) -> None:
    record = bundle.manifest.files["onnx/unet.weights"].model_copy(update={"sha256": "0" * 64})
    manifest = bundle.manifest.model_copy(update={"files": {**bundle.manifest.files, "onnx/unet.weights": record}})
    with pytest.raises(BackendError, match="load: .* holds results of another bundle"):
        verify(Bundle(bundle.folder, manifest), VerifyOptions(load=saved))


# Nothing compared


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"run__runners": {graph: [] for graph in RUNNERS}}, ("lcm_update", "vae_decoder", "clip")),
        ({"run__runners": {}}, tuple(RUNNERS)),
        ({"run__runners__lcm_update": []}, ("lcm_update",)),
        ({"run__unfinished": ["lcm_update"]}, ("lcm_update",)),
    ],
)
def test_an_interrupted_run_does_not_pass(
    bundle: Bundle, saved: Path, changes: dict[str, Any], missing: tuple[str, ...]
) -> None:
    edit(saved, **changes)
    report = verify(bundle, VerifyOptions(load=saved))
    assert (report.missing, report.passed) == (missing, False)


def test_a_comparison_of_a_graph_that_no_request_runs_does_not_pass(bundle: Bundle, saved: Path) -> None:
    report = verify(bundle, VerifyOptions(load=saved, graphs=("vae_encoder",)))
    assert (report.rows, report.missing, report.passed) == ((), (), False)


# Options


def test_options_that_contradict_loaded_results_are_refused(bundle: Bundle, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="size: the loaded results are of 32x32x2; leave --size out"):
        verify(bundle, VerifyOptions(load=saved, width=64, height=64))
    with pytest.raises(InvalidRequest, match="save: the loaded folder has these results already"):
        verify(bundle, VerifyOptions(load=saved, save=tmp_path / "new"))


@pytest.mark.parametrize("inside", ["inside", "lcm_update/inputs/inside", "../results/inside", "link/inside"])
def test_a_folder_inside_the_loaded_one_is_refused(bundle: Bundle, saved: Path, tmp_path: Path, inside: str) -> None:
    (saved / "link").symlink_to(saved / "clip", target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidRequest, match="save: .* is inside the loaded folder; name a folder elsewhere"):
        verify(bundle, VerifyOptions("onnxruntime", load=saved, save=saved / inside, graphs=("lcm_update",)))
    assert sorted(tmp_path.rglob("*")) == before


# Ctrl-C


@pytest.mark.usefixtures("raising")
def test_ctrl_c_stops_even_while_polygraphy_imports(
    bundle: Bundle, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Polygraphy imports torch when it reads the first file, and takes a KeyboardInterrupt for a missing module."""
    (tmp_path / "presses_ctrl_c.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(serde, "TORCH_REGISTRATION_SUCCESS", False)
    monkeypatch.setattr(serde, "torch", lazy_import("presses_ctrl_c"))
    assert run(["verify", str(bundle.folder), "--load", str(saved)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("raising")
def test_a_swallowed_ctrl_c_is_raised_at_the_end() -> None:
    for error in (None, BackendError("verify", "made of the KeyboardInterrupt")):
        with pytest.raises(KeyboardInterrupt), stoppable():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            if error is not None:
                raise error
    with stoppable():
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_library_may_say_300_characters() -> None:
    assert cut("x" * 300) == "x" * 300
    assert cut("x" * 301) == "x" * 300 + " ..."
