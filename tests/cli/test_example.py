"""`sparsectrl-lcm example`: what a clone has in `demo`, for readers who have only the package."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from fakes.quick_executor import quick_pipeline
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle

from sparsectrl_lcm import cli

DEMO = Path(__file__).parents[2] / "demo"


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_a_clone_and_the_printed_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["example"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert files(tmp_path / "demo/scribbles") == files(DEMO / "scribbles")
    assert (tmp_path / "demo/requests.jsonl").read_bytes() == (DEMO / "requests.jsonl").read_bytes()
    assert Bundle.load(tmp_path / "demo/bundle").manifest.checksum == Bundle.load(demo_bundle()).manifest.checksum

    ran: list[CheckedRequest] = []
    monkeypatch.setattr(VideoPipeline, "load", lambda *_, **__: quick_pipeline(ran.append))
    commands = [shlex.split(line) for line in told[1:]]
    assert [words[:2] for words in commands] == [["sparsectrl-lcm", "generate"], ["sparsectrl-lcm", "batch"]]
    for words in commands:
        assert cli.run(words[1:]) == 0
    assert "not trained" not in capsys.readouterr().err
    clip, *others = ran
    assert clip.prompt == "a yellow star grows over a navy and teal ground"
    assert ([item.index for item in clip.keyframes], clip.seed) == ([0, 8, 15], 4)
    assert Path("star.mp4").exists()
    assert len(others) == 3


def test_a_folder_with_files_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    Path("demo/mine").touch()
    refused = "exists and is not an empty folder; name a new folder\n"
    assert cli.run(["example"]) == 2
    assert capsys.readouterr().err == f"error: --output: 'demo' {refused}"
    assert cli.run(["example", "-o", "demo/mine"]) == 2
    assert capsys.readouterr().err == f"error: --output: 'demo/mine' {refused}"
    assert [path.name for path in Path("demo").iterdir()] == ["mine"]


def test_the_folder_of_the_shell_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    assert cli.run(["example", "-o", "."]) == 0
    assert Path.cwd() == tmp_path
    assert tmp_path.stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "requests.jsonl", "scribbles"]


def usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert cli.run(arguments) == 2
    return capsys.readouterr().err


def test_wrong_use_says_where_help_is(capsys: pytest.CaptureFixture[str]) -> None:
    see = "see `sparsectrl-lcm generate --help`\n"
    assert usage(["generate"], capsys) == f"error: Missing option '--prompt'; {see}"
    assert usage(["generate", "--prompt", "a"], capsys) == f"error: Missing option '--output' / '-o'; {see}"
    assert usage(["generate", "--promt", "a"], capsys).endswith(f"--prompt); {see}")
    assert usage(["gen"], capsys) == "error: No such command 'gen'; see `sparsectrl-lcm --help`\n"
    assert usage(["keys", "make"], capsys) == "error: No such command 'make'; see `sparsectrl-lcm keys --help`\n"
    wrong = usage(["generate", "--prompt", "a", "-o", "x.gif", "--seed", "1.5"], capsys)
    assert wrong.startswith("error: Invalid value for '--seed': ") and wrong.endswith(f"; {see}")
    expected = "error: export: --base and --output are missing; see `sparsectrl-lcm export --help`\n"
    assert usage(["export", "--motion-adapter", "x"], capsys) == expected


def test_help_says_how_to_begin_and_cuts_no_command_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    told = capsys.readouterr().out
    assert "sparsectrl-lcm example" in told
    assert "..." not in told.partition("Commands:")[2]
