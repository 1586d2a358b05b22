"""The lines of `batch`: their fields, seeds, pictures and errors."""

import base64
import io
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from .conftest import SMALL, Ran, batch, clips, results, write


def test_every_field_reaches_the_pipeline(ran: Ran) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 30:] = 255
    Path("pictures").mkdir()
    Image.fromarray(picture).save("pictures/a.png")
    file = io.BytesIO()
    Image.fromarray(picture[:, ::-1]).save(file, "PNG")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    fal = {
        "negative_prompt": "night",
        "controlnet_type": "rgb",
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "seed": -1,
        "keyframe_0_image_url": "pictures/a.png",
        "keyframe_1_index": 17,
        "keyframe_1_image_url": data,
        "sparsectrl_lcm": {"conditioning_scale": 0.5, "clip_skip": 1},
    }
    listed = {"keyframes": [{"index": -1, "image": "pictures/a.png"}]}
    write(SMALL | fal | listed | {"frames": 20, "context_length": 8, "decoder": "tiny"})
    assert batch() == 0
    (request,) = ran.requests
    assert (request.negative_prompt, request.controlnet, request.steps) == ("night", "rgb", 3)
    assert (request.guidance_scale, request.seed, request.frames) == (7.5, 2**64 - 1, 20)
    assert (request.conditioning_scale, request.clip_skip) == (0.5, 1)
    assert (request.width, request.height, request.decoder, request.context_length) == (64, 64, "tiny", 8)
    assert [item.index for item in request.keyframes] == [0, 17, 19]
    assert (request.keyframes[0].pixels == picture).all()
    assert (request.keyframes[1].pixels == picture[:, ::-1]).all()


def test_seeds_make_a_clip_each(ran: Ran) -> None:
    write(SMALL | {"seeds": 3}, SMALL | {"id": "b", "seed": 7, "seeds": 2})
    assert batch() == 0
    assert ran.seeds == [0, 1, 2, 7, 8]
    names = {"000001-seed0.gif", "000001-seed1.gif", "000001-seed2.gif", "b-seed7.gif", "b-seed8.gif"}
    assert clips() == names
    assert {item["file"]: item["seed"] for item in results()}["b-seed8.gif"] == 8


WRONG = {
    '{"prompt": "a': ("line", "it is not JSON"),
    "[1]": ("line", "[1] is not a JSON object"),
    "[" * 9999: ("line", "it is not JSON (too deeply nested)"),
    '{"prompt": "a", "width": "wide"}': ("width", "'wide' is not allowed"),
    '{"width": 64}': ("prompt", "it is missing"),
    '{"prompt": "a", "promt": 1}': ("promt", "there is no such field"),
    '{"prompt": "a", "sparsectrl_lcm": {"x": 1}}': ("sparsectrl_lcm.x", "there is no such field"),
    '{"prompt": "a", "id": "../a"}': ("id", "'../a' is not allowed"),
    '{"prompt": "a", "keyframes": [{"index": 0}]}': ("keyframes.0.image", "it is missing"),
    '{"prompt": "a", "keyframe_0_image_url": "https://x.org/a.png"}': ("keyframe_0_image_url", "not a local file"),
    '{"prompt": "a", "keyframe_0_image_url": "data:image/png"}': ("keyframe_0_image_url", "the data URI is damaged"),
    '{"prompt": "a", "keyframes": [{"index": 0, "image": "no.png"}]}': ("keyframe 0", "'no.png' does not exist"),
    '{"prompt": "a", "frames": 999}': ("frames", "999 is not allowed"),
    '{"prompt": "a", "guidance_scale": 31}': ("guidance_scale", "31.0 is not allowed"),
    '{"prompt": "a", "fps": 99}': ("fps", "99.0 is not allowed for .gif"),
    '{"prompt": "a", "seeds": 0}': ("seeds", "0 is not allowed"),
    f'{{"prompt": "a", "seed": {2**64 - 2}, "seeds": 4}}': ("seeds", f"4 from {2**64 - 2} on end at {2**64 + 1}"),
    '{"prompt": "a", "sparsectrl_lcm": {"clip_skip": 50}}': ("sparsectrl_lcm.clip_skip", "50 is not allowed"),
}


def test_wrong_lines_are_told_and_the_others_made(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(SMALL | {"seed": 1}, *WRONG, SMALL | {"seed": 2}, SMALL | {"id": "000001"})
    assert batch() == 1
    assert ran.seeds == [1, 2]
    found = {item["line"]: item for item in results()}
    for number, (field, reason) in enumerate(WRONG.values(), start=2):
        error = found[number]["error"]
        assert found[number]["status"] == "error"
        assert error["field"] == field, error
        assert reason in error["reason"]
    last = len(WRONG) + 3
    assert found[last]["error"]["reason"] == "'000001' is that of line 1 too"
    captured = capsys.readouterr()
    assert captured.out == f"out: 2 made, 0 kept, {len(WRONG) + 1} failed\n"
    assert "line 2: line: it is not JSON" in captured.err
    assert "promt: there is no such field; did you mean prompt?" in captured.err
    assert captured.err.endswith(f"and {len(WRONG) + 1 - 10} more errors, in out/results.jsonl\n")


def test_fields_of_objects_are_told_and_no_bar_is_shown_without_a_clip(
    ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = {"index": 0, "image": "a.png", "x": 1}
    write(SMALL | {"sparsectrl_lcm": {"clipskip": 1}}, SMALL | {"keyframes": [strange]})
    assert batch() == 1
    assert capsys.readouterr().err == (
        "line 1: sparsectrl_lcm.clipskip: there is no such field; did you mean clip_skip?\n"
        "line 2: keyframes.0.x: there is no such field; the fields are index, image\n"
    )


def test_no_bar_is_shown_if_all_clips_are_kept(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(SMALL)
    assert batch() == 0
    assert "1/1" in capsys.readouterr().err
    assert batch("--resume") == 0
    assert capsys.readouterr().err == ""


def test_requests_from_standard_input(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"".join(json.dumps(SMALL | {"seed": seed}).encode() + b"\n" for seed in range(4))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbf" + lines)))
    assert batch(requests="-") == 0
    assert ran.seeds == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_requests_from_a_pipe(ran: Ran) -> None:
    """As in `batch <(make-requests)`. Paths of pictures begin in the current folder."""
    os.mkfifo("requests")
    Image.new("RGB", (64, 64), "white").save("a.png")
    lines = "".join(json.dumps(SMALL | {"seed": seed, "keyframe_0_image_url": "a.png"}) + "\n" for seed in range(4))
    writer = threading.Thread(target=Path("requests").write_text, args=(lines,))
    writer.start()
    assert batch(requests="requests") == 0
    writer.join()
    assert ran.seeds == [0, 1, 2, 3]


def test_pictures_lie_beside_the_requests(ran: Ran) -> None:
    Path("inner").mkdir()
    Image.new("RGB", (64, 64), "white").save("inner/a.png")
    Path("inner/requests.jsonl").write_text(json.dumps(SMALL | {"keyframe_0_image_url": "a.png"}))
    assert batch(requests="inner/requests.jsonl") == 0
    assert len(ran.requests[0].keyframes) == 1


def test_a_line_of_other_bytes_is_told(ran: Ran) -> None:
    Path("requests.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert batch() == 1
    assert results()[0]["error"]["reason"].startswith("it is not JSON")
