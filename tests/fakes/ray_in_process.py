"""Stands in for Ray: an actor is an object of this process, and its tasks have run once they are returned.

What goes to an actor and what comes back is copied, as between processes.
"""

import pickle
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any


class RayInProcess:
    """The functions of the module `ray` that `batch` calls, for actors that never die."""

    exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def remote(self, actor: type) -> Any:
        """Returns the class of an actor; options have no effect."""
        made = SimpleNamespace(remote=lambda *given: _Actor(actor(*_copied(given))))
        return SimpleNamespace(options=lambda **_: made)

    def wait(self, tasks: Sequence["_Task"]) -> tuple[list["_Task"], list["_Task"]]:
        """Returns the first task, and the others."""
        return list(tasks[:1]), list(tasks[1:])

    def get(self, task: "_Task") -> Any:
        """Returns what a task has returned."""
        return task.value

    def cancel(self, task: "_Task") -> None:
        """Does nothing: no task still runs."""


class _Task:
    def __init__(self, value: Any) -> None:
        self.value = value


class _Actor:
    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        method: Callable[..., Any] = getattr(self._made, name)
        return SimpleNamespace(remote=lambda *given: _Task(_copied(method(*_copied(given)))))


def _copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
