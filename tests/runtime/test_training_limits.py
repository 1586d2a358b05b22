"""Requests that leave what a bundle's model was trained for: one line that names every limit, each once."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.quick_executor import quick_pipeline
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import ClipRequest, Keyframe, VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle

KNOWN = "A red star, moves up and right over a grey ground"
BEGINNING = "the model was not trained for this request, whose clip may be poor: "
LINE = np.abs(np.subtract.outer(np.arange(128), np.arange(128))) < 4


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the warnings since the last call say after their common beginning."""
    messages = list(caplog.messages)
    caplog.clear()
    assert all(message.startswith(BEGINNING) for message in messages)
    return [message.removeprefix(BEGINNING) for message in messages]


def keyframes(count: int) -> list[Keyframe]:
    return [Keyframe(index, LINE) for index in range(count)]


def test_a_request_within_the_training_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quick_pipeline()
    pipeline.generate(KNOWN, keyframes(3), negative_prompt="night", seed=1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"width": 64}, "64x128 instead of 128x128"),
        ({"num_frames": 20}, "20 frames instead of 16"),
        ({"keyframes": ()}, "no keyframes instead of 3"),
        ({"keyframes": keyframes(1)}, "1 keyframe instead of 3"),
        ({"keyframes": keyframes(4)}, "4 keyframes instead of 3"),
        ({"prompt": "a wide-eyed Cat, a cat and a star"}, "unknown words: cat, wide-eyed"),
        ({"negative_prompt": "night", "guidance_scale": 2}, "unknown words: night"),
        ({"prompt": "a (red:1.3) [boat]", "prompt_weights": True}, "unknown words: boat"),
        (
            {"width": 64, "height": 64, "num_frames": 4, "keyframes": keyframes(4), "prompt": "a boat"},
            "64x64 instead of 128x128; 4 frames instead of 16; 4 keyframes instead of 3; unknown words: boat",
        ),
    ],
)
def test_what_leaves_the_training_is_named_in_one_line(
    options: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    quick_pipeline().run(ClipRequest(**{"prompt": KNOWN, "keyframes": keyframes(3), "seed": 1, **options}))
    assert told(caplog) == [expected]


def test_each_limit_is_told_once_for_a_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quick_pipeline()
    requests = [ClipRequest("a boat", keyframes(3), seed=seed, width=64) for seed in range(3)]
    assert len(list(pipeline.generate_many(requests))) == 3
    assert told(caplog) == ["64x128 instead of 128x128; unknown words: boat"]
    pipeline.generate("a cat", seed=1, width=32, num_frames=4)
    assert told(caplog) == ["4 frames instead of 16; no keyframes instead of 3"]


def test_a_long_list_of_words_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    quick_pipeline().check(ClipRequest(" ".join(f"word{number}" for number in range(99)), keyframes(3)))
    (line,) = told(caplog)
    assert line.startswith("unknown words: word0, word1, word10") and line.endswith(" ...") and len(line) < 110


def test_a_bundle_that_does_not_say_it_is_never_left(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quick_pipeline()
    silent = Bundle(pipeline.bundle.folder, pipeline.bundle.manifest.model_copy(update={"trained_for": None}))
    VideoPipeline(silent, pipeline.executor).generate("a boat", seed=1, width=64)
    assert not caplog.records


@pytest.mark.parametrize(
    ("least", "given", "expected"), [(0, 0, []), (2, 2, []), (2, 1, ["1 keyframe instead of 2 to 3"])]
)
def test_a_model_may_need_fewer_keyframes_or_none(
    least: int, given: int, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = quick_pipeline()
    record = pipeline.bundle.manifest.trained_for
    assert record is not None
    record = record.model_copy(update={"min_keyframes": least})
    bundle = Bundle(pipeline.bundle.folder, pipeline.bundle.manifest.model_copy(update={"trained_for": record}))
    VideoPipeline(bundle, pipeline.executor).generate(KNOWN, keyframes(given), seed=1)
    assert told(caplog) == expected


def test_generate_tells_it_in_one_line_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VideoPipeline, "load", lambda *_, **__: quick_pipeline())
    given = ["generate", "--prompt", "a boat", "--size", "64x64", "--backend", "onnxruntime", "-o"]
    expected = BEGINNING + "64x64 instead of 128x128; no keyframes instead of 3; unknown words: boat"
    for name, more in (("one.gif", []), ("several.gif", ["--seeds", "3"])):
        with monkeypatch.context() as patch:
            patch.setattr(logging.root, "handlers", [])  # as in a process without pytest
            assert run([*given, str(tmp_path / name), *more]) == 0
        assert capsys.readouterr().err.count(expected) == 1


def test_inspect_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "trained for:          16 frames of 128x128, 3 keyframes" in lines
    (words,) = [line for line in lines if line.startswith("words:")]
    assert words.split(None, 3)[1:3] == ["a,", "an,"] and words.endswith("white, yellow")
    assert run(["inspect", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trained_for"]
    assert found == json.loads((Bundle.load().folder / "manifest.json").read_text())["trained_for"]
