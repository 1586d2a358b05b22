"""What all commands do alike: `-h`, and an option that takes one value is refused if it is given twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sparsectrl_lcm import cli


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from commands(subcommand, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_h_is_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*path, "--help"]) == 0
    long = capsys.readouterr().out
    assert cli.run([*path, "-h"]) == 0
    assert capsys.readouterr().out == long
    assert "-h, --help" in long


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_single_option_is_not_taken_twice(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for option in COMMANDS[path].params:
        if option.param_type_name != "option" or option.is_flag or option.multiple:
            continue
        name = max(option.opts, key=len)
        assert cli.run([*path, f"{name}=1", option.opts[-1], "1"]) == 2
        assert capsys.readouterr() == ("", f"error: {name}: was given 2 times; give it once\n")


def test_other_options_are_taken_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags, which say the same twice, and options for several values."""
    keyframes = ("--keyframe", f"0={tmp_path}/a.png", "--keyframe", f"1={tmp_path}/b.png")
    flags = ("--long-prompts", "--long-prompts")
    output = str(tmp_path / "a.gif")
    assert cli.run(["generate", "--prompt", "a", *keyframes, *flags, "--backend", "onnxruntime", "-o", output]) == 2
    assert "keyframe 0: " in capsys.readouterr().err
