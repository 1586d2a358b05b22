"""Worker processes that answer questions: one line of JSON in, one line of JSON out."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ...runtime.errors import SparseCtrlLcmError, first_line

END_SECONDS = 10.0
"""Longest time for a process to end after its input is closed."""
STOP_SECONDS = 20.0
"""Longest time for a process to end after each signal of `stop_with_children`."""


class WorkerFailed(SparseCtrlLcmError):
    """A worker could not answer, or its process ended. The message has the reason in one line."""


class Worker:
    """A process that runs `serve`.

    Args:
        command: the program and its arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._waiting = False
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )

    def ask(self, question: str, **values: Any) -> dict[str, Any]:
        """Asks a question and waits for the answer.

        Args:
            question: the name of a question that the process answers.
            values: its arguments, as JSON values.

        Raises:
            WorkerFailed: the process could not answer, or ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._waiting = True
        answer = ""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"ask": question, **values}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise WorkerFailed("", self._how_it_ended())
        self._waiting = False
        reply: dict[str, Any] = json.loads(answer)
        if "failed" in reply:
            raise WorkerFailed(**reply["failed"])
        return reply

    def close(self) -> None:
        """Ends the process and its children; kills them if it still works on an answer."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(0 if self._waiting else END_SECONDS)
        except subprocess.TimeoutExpired:
            kill_with_children(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _how_it_ended(self) -> str:
        """The exit code or signal of the process, with the last line that it wrote to stderr."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -9:
            return "was killed, as systems do if memory runs out"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{how}: {lines[-1].strip()}" if lines else how


def kill_with_children(process: subprocess.Popen[Any]) -> None:
    """Kills a process, on POSIX also the processes that it started, and waits for it.

    Args:
        process: was started with `start_new_session=True`, so that it leads its own process group.
    """
    if process.poll() is None:
        if sys.platform != "win32":
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()


def stop_with_children(process: subprocess.Popen[Any], seconds: float = STOP_SECONDS) -> None:
    """Asks a process to end with SIGINT, then with SIGTERM, and kills it with its children if it does not.

    A build of engines ends at its next step after SIGINT, and cleans up.

    Args:
        process: was started with `start_new_session=True`.
        seconds: longest time to wait after each signal.
    """
    asked = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGINT, signal.SIGTERM)
    for number in asked:
        if process.poll() is None:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    kill_with_children(process)


def serve(answers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers questions from stdin until it is closed. All other output of the process goes to stderr.

    Args:
        answers: the function that answers each question, by its name.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            question = json.loads(line)
            try:
                reply = answers[question.pop("ask")](**question)
            except SparseCtrlLcmError as error:
                reply = {"failed": {"field": error.field, "reason": error.reason, "remedy": error.remedy}}
            except Exception as error:  # every failure becomes an answer, so that the other contenders go on
                reply = {"failed": {"field": type(error).__name__, "reason": first_line(error)}}
            print(json.dumps(reply), file=replies, flush=True)
