"""What figures hold for: the machine, the versions and the commit."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MATRIX_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Instruction sets that decide how fast a processor multiplies matrices in each precision, by Linux' names."""


def report_head(command: str, packages: Iterable[str]) -> dict[str, Any]:
    """What every report begins with; packages that are not installed are left out."""
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": machine(),
        "versions": versions(packages),
        "commit": commit(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; memory is None where the system does not tell, of `MATRIX_SETS` none."""
    memory, sets = memory_bytes(), instruction_sets()
    return {
        "processor": next(iter(_cpu_fields("model name")), platform.processor() or platform.machine()),
        "instruction_sets": [name for name in MATRIX_SETS if name in sets],
        "cores": os.cpu_count(),
        "physical_cores": physical_cores(),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "system": platform.platform(terse=True),
    }


def physical_cores() -> int:
    """Cores that this process may use, without those that share one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = set(zip(_cpu_fields("physical id"), _cpu_fields("core id"), strict=False))
    return min(usable, len(places) or usable)


def instruction_sets() -> frozenset[str]:
    """The processor's instruction sets by Linux' names; none where the system does not tell."""
    return frozenset(next(iter(_cpu_fields("flags")), "").split())


def memory_bytes() -> int | None:
    """The machine's memory, or what its container may use of it."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    with suppress(OSError, ValueError):  # also where it holds the word max
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def peak_bytes() -> int | None:
    """The largest resident memory of this process so far; None where the system does not tell.

    Linux' getrusage also counts what the parent had taken when it started this process, so the kernel's own mark is
    read there.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """The commit that this code was checked out at, with `-dirty` where files differ; None for an installed one."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # as in an environment inside another repository
        return None
    return git("describe", "--always", "--dirty", "--exclude", "*", "--abbrev=40")


def _cpu_fields(name: str) -> list[str]:
    """A field of each of Linux' processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name]
