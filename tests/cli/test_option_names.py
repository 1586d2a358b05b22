"""Errors name options of the command that was typed, and a refused command leaves no new folder."""

from pathlib import Path

import pytest
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import demo_bundle

from sparsectrl_lcm import cli

DEMO = str(demo_bundle())
GENERATE = ("generate", "--prompt", "a", "--backend", "onnxruntime", "-o", "new/sub/clip.gif")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("serve", "--data", "new/data", "--warm", "128x100"),
            "--warm height: 100 is not allowed; give a",
        ),
        ((*GENERATE, "--size", "100x128"), "--size width: 100 is not allowed; give a multiple of 8"),
        ((*GENERATE, "--keyframe", "99=a.png"), "--keyframe index: 99 is not allowed; give a whole number from -16"),
        ((*GENERATE, "--keyframe", "0=a.png", "--keyframe", "0=a.png"), "--keyframe: index 0 was given twice"),
        ((*GENERATE, "--control-end", "0"), "--control-end: 0 is not above the start"),
        ((*GENERATE, "--guidance", "nan"), "--guidance: nan is not allowed"),
        (("bench", DEMO, "--steps", "0"), "--steps: 0 is not allowed"),
        (("build", DEMO, "--backend", "tensorrt", "--size", "100x128"), "--size: 100x128 is not allowed"),
        (("build", DEMO, "--backend", "tensorrt", "--keyframes", "0"), "--keyframes: 0 is"),
        (("build", DEMO, "--backend", "openvino", "--graph", "nope"), "--graph: openvino builds no 'nope'"),
        (("build", DEMO, "--backend", "onnxruntime", "--precision", "int8"), "--precision: 'int8' is not one of"),
        (("verify", DEMO, "--backend", "onnxruntime", "--save", "new/x", "--graph", "nope"), "--graph: 'nope' is not"),
    ],
)
def test_an_error_names_an_option_of_its_command(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert list(tmp_path.iterdir()) == []


def test_export_names_its_options_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sources = ("--base", "nothing", "--motion-adapter", "nothing")
    for arguments, option in (
        (("export", *sources), "--base"),
        (("export", "controlnet", DEMO, "--rgb", "nothing"), "--rgb"),
        (("export", "motion-module", DEMO, "--motion-adapter", "nothing"), "--motion-adapter"),
        (("export", "lora", DEMO, "--lora", "nothing", *sources), "--lora"),
    ):
        assert cli.run([*arguments, "-o", "new/sub/bundle"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option}: cannot load 'nothing': ")
        assert list(tmp_path.iterdir()) == []


def test_full_memory_names_only_options_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VideoPipeline, "load", full)
    Path("requests.jsonl").touch()
    assert cli.run(GENERATE) == 2
    assert capsys.readouterr().err == "error: out of memory; choose a smaller --size or fewer --frames\n"
    assert cli.run(["batch", "requests.jsonl", "-o", "new"]) == 2
    assert capsys.readouterr().err == "error: out of memory\n"
