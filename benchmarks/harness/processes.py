"""Processes that are asked one line of JSON at a time, and answer with one."""

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
"""What a process has to end by itself."""


class WorkerFailed(SparseCtrlLcmError):
    """A worker could not answer, or has died; the message says why in one line."""


class Worker:
    """A process that runs `serve`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._waiting = False
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )

    def ask(self, question: str, **values: Any) -> dict[str, Any]:
        """Asks, and waits for the answer.

        Raises:
            WorkerFailed: it could not answer, or has died.
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
            raise WorkerFailed("", self._last_words())
        self._waiting = False
        reply: dict[str, Any] = json.loads(answer)
        if "failed" in reply:
            raise WorkerFailed(**reply["failed"])
        return reply

    def close(self) -> None:
        """Ends the process: at once where it is still at work, with those that it started."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(0 if self._waiting else END_SECONDS)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        """How the process ended."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -9:
            return "was killed, as a system does where memory runs out"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{how}: {lines[-1].strip()}" if lines else how


def serve(answers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers questions from stdin until it is closed; whatever is printed meanwhile goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            question = json.loads(line)
            try:
                reply = answers[question.pop("ask")](**question)
            except SparseCtrlLcmError as error:
                reply = {"failed": {"field": error.field, "reason": error.reason, "remedy": error.remedy}}
            except Exception as error:  # whatever it is, the others go on
                reply = {"failed": {"field": type(error).__name__, "reason": first_line(error)}}
            print(json.dumps(reply), file=replies, flush=True)
