"""`generate -o -`: stdout gets the bytes of the file, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sparsectrl_lcm.cli.stdout_clip import clip_for_stdout
from sparsectrl_lcm.runtime import OutputError

from sparsectrl_lcm import cli

SMALL = (
    "generate",
    "--prompt",
    "a boat",
    "--backend",
    "onnxruntime",
    "--size",
    "64x64",
    "--frames",
    "2",
    "--steps",
    "1",
)
COMMAND = (sys.executable, "-m", "sparsectrl_lcm", *SMALL, "--seed", "7")


@pytest.mark.parametrize("options", [("mp4",), ("gif", "--format", "gif")], ids=lambda options: options[0])
def test_stdout_gets_the_file(
    options: tuple[str, ...], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    file = tmp_path / f"clip.{options[0]}"
    assert cli.run([*SMALL, "--seed", "7", "-o", str(file)]) == 0
    capfdbinary.readouterr()
    assert cli.run([*SMALL, "--seed", "7", "-o", "-", *options[1:]]) == 0
    out, err = capfdbinary.readouterr()
    assert out == file.read_bytes()
    assert b"stdout: 2 frames of 64x64, seed 7" in err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_terminal_gets_no_clip() -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        result = subprocess.run(
            [*COMMAND, "-o", "-"], stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == 2
    reason = "stdout is a terminal; send it to a file or program, or name a file"
    assert result.stderr == f"error: --output: {reason}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="it is about POSIX pipes")
def test_a_closed_pipe_ends_the_command_without_words() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [*COMMAND, "-o", "-"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("seconds: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_a_full_stdout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "output: stdout cannot be written: No space left on device"
    with Path("/dev/full").open("wb") as full, pytest.raises(OutputError, match=expected):
        monkeypatch.setattr(sys, "stdout", full)
        with clip_for_stdout("gif") as path:
            path.write_bytes(b"a clip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "-", "--seeds", "2"), "--seeds: several clips cannot go to stdout; name a file, such as -o clip.mp4"),
        (("-o", "-", "--format", "avi"), "--format: 'avi' is not allowed; give mp4, webm, gif, webp, png"),
        (
            ("-o", "a.gif", "--format", "gif"),
            "--format: it is for clips to stdout; give -o -, or a file with the format's",
        ),
    ],
)
def test_what_cannot_go_there(options: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*SMALL, *options]) == 2
    out, err = capfd.readouterr()
    assert (out, err.partition(message)[0]) == ("", "error: ")
