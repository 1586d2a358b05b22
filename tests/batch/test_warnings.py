"""Warnings of a batch name the lines that they are about, and each kind is told once at once and once at the end."""

import json
from pathlib import Path

import pytest
from PIL import Image
from sparsectrl_lcm.batch.ray_pipelines import EncodedClip, RemotePipeline
from sparsectrl_lcm.batch.request_lines import Job, read_jobs
from sparsectrl_lcm.runtime.errors import BackendError, SparseCtrlLcmError

from .conftest import SMALL, Ran, batch, results, write

SCRIBBLES = [{"index": index, "image": "lines.png"} for index in (0, 8, 15)]
KNOWN = {"prompt": "a red star", "width": 128, "height": 128, "frames": 16, "keyframes": SCRIBBLES}
UNTRAINED = "the model was not trained for this request, whose clip may be poor: "


def draw_lines() -> None:
    """Draws the picture of `SCRIBBLES`: a white bar on black."""
    Image.new("RGB", (8, 128), "white").crop((-60, 0, 68, 128)).save("lines.png")


def test_a_kind_is_told_once_with_its_lines(
    ran: Ran, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    draw_lines()
    Image.new("RGB", (128, 128)).save("black.png")
    odd = KNOWN | {"keyframes": [{"index": 0, "image": "black.png"}, *SCRIBBLES[1:]]}
    lines = [KNOWN, KNOWN | {"prompt": "a cat"}, KNOWN | {"prompt": "a dog", "seeds": 3}, odd, KNOWN, KNOWN]
    write(*lines, *(KNOWN | {"prompt": f"thing{number}"} for number in range(20)), odd, SMALL)
    assert batch() == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("line")]
    assert told == [
        f"line 2: {UNTRAINED}unknown words: cat",
        "line 4: keyframe 0 is all black; a scribble is white lines on black",
        f"line 28: {UNTRAINED}64x64 instead of 128x128; 2 frames instead of 16; no keyframes instead of 3; "
        "unknown words: boat",
        "lines 3, 7-26 too: untrained words",
        "line 27 too: odd scribble",
    ]
    assert not caplog.records, "they are not logged as well"
    by_line = {item["line"]: item.get("warnings", []) for item in results()}
    assert by_line[1] == by_line[5] == []
    assert by_line[3] == [f"{UNTRAINED}unknown words: dog"]
    assert by_line[27] == ["keyframe 0 is all black; a scribble is white lines on black"]


def test_many_lines_apart_are_counted(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    draw_lines()
    write(*(KNOWN | {"width": 64 if number % 2 else 128} for number in range(1, 31)))
    assert batch() == 0
    assert "\nlines 3, 5, 7, 9, 11, 13, 15, 17, 19, 21 and 4 more too: untrained size\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault", [None, RuntimeError("a fault\nwith details"), BackendError("backend", "a fault")], ids=repr
)
def test_a_pipeline_on_ray_hands_its_warnings_over(
    ran: Ran, caplog: pytest.LogCaptureFixture, fault: Exception | None
) -> None:
    """Also those of a request that fails."""
    if fault is not None:
        ran.faults = {1: fault}
    pipeline = RemotePipeline(None, {})
    for number in range(2):
        (job,) = read_jobs([json.dumps(SMALL | {"seed": 1}).encode()], Path(), Path(), ".gif", metadata=False)
        assert isinstance(job, Job)
        made, (warning,) = pipeline.make(job.request, f"{number}.gif", 8, metadata=False)
        assert warning.text.endswith("unknown words: boat")
        if fault is None:
            assert isinstance(made, EncodedClip)
        else:
            assert isinstance(made, SparseCtrlLcmError)
            assert (made.field, made.reason) == (getattr(fault, "field", ""), "a fault")
    assert not [record for record in caplog.records if record.name == "sparsectrl_lcm.request"]
