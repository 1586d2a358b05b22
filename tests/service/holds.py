"""Clips of the stub pipeline that a test holds: in their second step, until it lets them go."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hold:
    """A hold of all clips with its prompt. `file` counts the steps that they may take.

    A held clip can be cancelled, and does not count as hung.
    """

    file: Path

    @property
    def prompt(self) -> str:
        return f"held {self.file}"

    def let_go(self, steps: int = 100) -> None:
        """Lets the clips take so many more steps."""
        with self.file.open("ab") as file:
            file.write(bytes(steps))
