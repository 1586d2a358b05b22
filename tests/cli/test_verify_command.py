"""The verify command: its table, JSON, exit codes, and one line for bad input."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.engine.comparison import Difference
from sparsectrl_lcm.engine.verify import verify as verify_module
from sparsectrl_lcm.engine.verify.header import EngineRun
from sparsectrl_lcm.engine.verify.layers import Jump
from sparsectrl_lcm.engine.verify.report import Report, Row
from sparsectrl_lcm.engine.verify.verify import VerifyOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle

RUN = EngineRun(
    backend="tensorrt",
    version="11.4",
    device="H200",
    precision="fp16",
    precisions={},
    unfinished=(),
    notes=("unet did not run on the library alone: tensorrt is not installed",),
)
GOOD = Row("lcm_update", "runtime", 12, "fp32", {"images": Difference(1e-7, 1e-8, 1.0)}, {}, 0)
FRAMES = Row("clip", "replayed", 3, "fp16", {"frames": Difference(0.1, 0.01, 0.9999, 0.5, 47.0)}, {}, 0)
OUTPUTS = {"other": Difference(9e-3, 1e-8, 1.0), "prediction": Difference(0.5, 0.1, 0.9)}
BAD = Row("unet", "runtime", 16, "fp16", OUTPUTS, {"prediction": ("largest", "quantile", "cosine")}, 3)
JUMP = Jump("add_1", "up_blocks.0/Add_7", "Add", ("down_residual_2",), 0.5, 1e-4)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Lets `verify` return `answer["report"]`; puts its options under `options`."""
    given: dict[str, object] = {}

    def verify(bundle: Bundle, options: VerifyOptions, on_progress: object) -> object:
        given["options"] = options
        return given["report"]

    monkeypatch.setattr(verify_module, "verify", verify)
    monkeypatch.setenv("COLUMNS", "40")
    return given


def test_a_passing_table(answer: dict[str, object], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer["report"] = Report(RUN, "512x512x16", (GOOD, FRAMES))
    options = [
        "--backend",
        "tensorrt",
        "--precision",
        "fp16",
        "--size",
        "512x512",
        "--graph",
        "unet",
        "--graph",
        "clip",
    ]
    assert run(["verify", *options, "--layers", "--save", str(tmp_path / "x"), "--load", str(tmp_path / "y")]) == 0
    assert answer["options"] == VerifyOptions(
        "tensorrt", "fp16", 512, 512, ("unet", "clip"), True, tmp_path / "x", tmp_path / "y"
    )
    text = capsys.readouterr().out
    assert "tensorrt 11.4 fp16 on H200, clips of 512x512x16, against ONNX Runtime" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert cells == [
        ["lcm_update", "runtime", "12", "fp32", "images", "1.0e-07", "1.0e-08", "1.000000", "-", "-", "ok"],
        ["clip", "replayed", "3", "fp16", "frames", "1.0e-01", "1.0e-02", "0.999900", "0.50", "47 dB", "ok"],
    ]
    assert RUN.notes[0] in text
    assert text.endswith("all within bounds\n")


def test_a_failure_names_output_tensor_and_graph(answer: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    answer["report"] = Report(RUN, "512x512x16", (GOOD, BAD), missing=("vae_decoder",), jumps={"unet": JUMP})
    assert run(["verify"]) == 1
    text = capsys.readouterr().out
    assert "out of bounds: largest, quantile, cosine" in text
    assert "prediction" in text
    assert (
        "unet: the error jumps from 1.0e-04 to 5.0e-01 at 'add_1', the result of Add 'up_blocks.0/Add_7', "
        "which takes down_residual_2\n" in text
    )
    assert "not compared, since the run was interrupted: vae_decoder\n" in text
    assert text.endswith("failed: unet\n")
    answer["report"] = Report(RUN, "512x512x16", (BAD,), jumps={"unet": None})
    assert run(["verify"]) == 1
    assert "so a fusion is at fault" in capsys.readouterr().out


def test_clips_that_were_not_replayed_fail(answer: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    answer["report"] = Report(RUN, "512x512x16", (GOOD, replace(FRAMES, runner="not replayed")))
    assert run(["verify"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"not replayed .* 47 dB +│ failed", text)
    assert text.endswith("failed: clip\n")


@pytest.mark.parametrize(
    ("report", "last"),
    [
        (Report(RUN, "512x512x16", (), missing=("unet",)), ["unet", "nothing was compared"]),
        (Report(RUN, "512x512x16", ()), ["nothing was compared"]),
        (Report(RUN, "512x512x16", (GOOD,), missing=("unet",)), ["unet", "the comparison is not complete"]),
        (Report(RUN, "512x512x16", (GOOD,), missing=("lcm_update",)), ["all runners", "is not complete"]),
    ],
)
def test_what_was_not_compared_does_not_pass(
    answer: dict[str, object], capsys: pytest.CaptureFixture[str], report: Report, last: list[str]
) -> None:
    answer["report"] = report
    assert run(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for line, text in zip(lines[-len(last) :], last, strict=True):
        assert re.match("(not compared|failed: )", line)
        assert text in line


@pytest.mark.parametrize("terminal", [False, True])
def test_no_cell_is_cut(
    answer: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    answer["report"] = Report(RUN, "512x512x16", (replace(GOOD, graph="controlnet_scribble"), BAD))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert run(["verify"]) == 1
    text = capsys.readouterr().out
    assert "…" not in text
    assert ("controlnet_scribble" in text) != terminal, "a narrow terminal wraps"


def test_json(answer: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    answer["report"] = Report(RUN, "512x512x16", (FRAMES, BAD), jumps={"unet": JUMP})
    assert run(["verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["backend"], found["device"], found["size"]) == (
        False,
        "tensorrt",
        "H200",
        "512x512x16",
    )
    assert found["rows"][0]["outputs"]["frames"]["psnr"] == 47
    assert found["rows"][1]["exceeded"] == {"prediction": ["largest", "quantile", "cosine"]}
    assert found["jumps"]["unet"]["takes"] == ["down_residual_2"]


WRONG = [
    (["/nowhere"], "bundle: '/nowhere' is not a folder"),
    (["--backend", "magic"], "--backend: 'magic' is unknown; allowed are tensorrt, "),
    (["--backend", "openvino", "--precision", "fp4"], "--precision: 'fp4' is unknown to openvino; allowed are bf16, "),
    (
        ["--backend", "openvino", "--precision", "int8"],
        "int8 engines were not built; run: sparsectrl-lcm build .* --precision int8$",
    ),
    (["--backend", "openvino", "--size", "33x32"], "--size: 33x32 is not allowed; give multiples of 8"),
    (["--size", "large"], "--size: 'large' is not allowed; give WIDTHxHEIGHT"),
    (["--graph", "vae"], "--graph: 'vae' is not in this bundle; allowed are text_encoder, vae_encoder, "),
    (["--backend", "onnxruntime", "--save", "{}"], "--save: '.*' is not empty; name a new folder"),
    (["--load", "{}"], "--load: '.*' is no folder of results; name one from --save"),
    (["--load", "{}/nothing"], "--load: '.*' is no folder of results; name one from --save"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(["verify", *(text.format(tmp_path) for text in arguments)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_polygraphy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert run(["verify"]) == 2
    expected = "error: verify: Polygraphy is not installed; run: pip install 'sparsectrl-lcm[verify]'\n"
    assert capsys.readouterr().err == expected
