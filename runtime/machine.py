"""The head of every report: the machine, the versions and the commit that its figures hold for."""

import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import operating_system
from .operating_system import cpu_fields, memory_bytes, peak_bytes

__all__ = [
    "MATRIX_SETS",
    "commit",
    "instruction_sets",
    "machine",
    "memory_bytes",
    "peak_bytes",
    "physical_cores",
    "report_head",
    "versions",
]

MATRIX_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Instruction sets that decide how fast a processor multiplies matrices in each precision, by Linux's names."""


def report_head(command: str, packages: Iterable[str]) -> dict[str, Any]:
    """The head of every report. Packages that are not installed are left out."""
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": machine(),
        "versions": versions(packages),
        "commit": commit(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; memory is None and `instruction_sets` empty if unknown."""
    memory, sets = memory_bytes(), instruction_sets()
    return {
        "processor": next(iter(cpu_fields("model name")), platform.processor() or platform.machine()),
        "instruction_sets": [name for name in MATRIX_SETS if name in sets],
        "cores": os.cpu_count(),
        "physical_cores": physical_cores(),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "system": platform.platform(terse=True),
    }


def physical_cores() -> int:
    """Physical cores that this process may use."""
    usable = operating_system.usable_cores()
    return min(usable, operating_system.installed_physical_cores() or usable)


def instruction_sets() -> frozenset[str]:
    """The processor's instruction sets by Linux's names; empty if the system does not report them."""
    return frozenset(next(iter(cpu_fields("flags")), "").split())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files differ; None for an installed package."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, encoding="utf-8", check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # such as an environment inside another repository
        return None
    return git("describe", "--always", "--dirty", "--exclude", "*", "--abbrev=40")
