"""What differs between Linux, Windows and macOS. The service runs on Linux and macOS only.

Facts that a system does not report are None or empty.
"""

import mmap
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

CUDA_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""NVIDIA's driver, by the name that the system's loader uses."""
CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
"""NVIDIA's library for convolutions, likewise."""
UNFINISHED = ".part-"
"""Begins the names of files that are removed or renamed soon; only killed processes leave them."""
_SEARCH_BESIDE_THE_LIBRARY = 0x8
"""Windows' LOAD_WITH_ALTERED_SEARCH_PATH, which needs an absolute path."""


def shared_library_pattern(name: str) -> str:
    """The pattern for `Path.glob` of a shared library whose file name ends in its version."""
    return f"{name}_[0-9]*.dll" if sys.platform == "win32" else f"lib{name}.so.*"


def shared_library_name(name: str) -> str:
    """The file name of a shared library without a version."""
    return f"{name}.dll" if sys.platform == "win32" else f"lib{name}.so"


def loading_error(library: Path | str) -> str | None:
    """Loads a shared library; returns the loader's sentence if that or a library that it needs cannot be loaded."""
    import ctypes

    mode = _SEARCH_BESIDE_THE_LIBRARY if Path(library).is_absolute() else 0  # both search PATH on Windows, too
    try:
        ctypes.CDLL(str(library), winmode=mode)
    except OSError as error:
        return " ".join(str(error).split())
    return None


def usable_cores() -> int:
    """Logical cores that this process may use."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def take_cores(place: int, shares: int, spare: int) -> int | None:
    """Limits this process to one of equal shares of the cores that it may use; hardware threads stay together.

    Libraries that tie their threads to cores would otherwise tie those of all processes to the same ones.

    Args:
        place: number of the share, from 0.
        shares: how many there are.
        spare: cores that belong to no share, if each share still has one.

    Returns:
        The physical cores of the share; None, without a limit, if there are fewer cores than shares, and on systems
        that set no limits.
    """
    if sys.platform != "linux":
        return None
    of_core: dict[tuple[str, ...], list[int]] = {}
    names = ("physical id", "core id") if cpu_fields("core id") else ("processor",)
    usable = os.sched_getaffinity(0)
    for number, *core in zip(map(int, cpu_fields("processor")), *map(cpu_fields, names), strict=False):
        if number in usable:
            of_core.setdefault(tuple(core), []).append(number)
    cores = list(of_core.values())
    if len(cores) < shares:
        return None
    cores = cores[spare if len(cores) - spare >= shares else 0 :]
    share = cores[place * len(cores) // shares : (place + 1) * len(cores) // shares]
    os.sched_setaffinity(0, [number for core in share for number in core])
    return len(share)


def installed_physical_cores() -> int | None:
    """Physical cores of the machine; hardware threads do not count."""
    places = set(zip(cpu_fields("physical id"), cpu_fields("core id"), strict=False))
    if places or (psutil := _psutil()) is None:
        return len(places) or None
    count: int | None = psutil.cpu_count(logical=False)
    return count


def cpu_fields(name: str) -> list[str]:
    """A field of each processor in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name]


def memory_bytes() -> int | None:
    """The machine's memory in bytes, or on Linux the limit of its container if that is lower."""
    if (total := _installed_memory()) is None:
        return None
    with suppress(OSError, ValueError):  # ValueError: the file holds the word max
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return total


def _installed_memory() -> int | None:
    if sys.platform != "win32":
        with suppress(AttributeError, ValueError, OSError):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    psutil = _psutil()
    return None if psutil is None else int(psutil.virtual_memory().total)


def peak_bytes() -> int | None:
    """The largest resident memory of this process so far, in bytes.

    On Linux, getrusage also counts memory that the parent held when it started this process, so /proc is read instead.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform != "win32":
        with suppress(ImportError):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    psutil = _psutil()
    peak: int | None = None if psutil is None else getattr(psutil.Process().memory_info(), "peak_wset", None)
    return peak


def check_writable(folder: Path) -> None:
    """Creates a file in a folder and removes it. On Windows, os.access always says yes and tempfile retries for hours.

    Raises:
        OSError: no file can be created there.
    """
    probe = folder / f"{UNFINISHED}{token_hex(4)}"
    probe.touch(exist_ok=False)
    with suppress(OSError):
        probe.unlink()


def forget_mapped_files(folder: Path, ending: str) -> None:
    """Gives the pages of mapped files back to Linux; later reads load them from the files again.

    Args:
        folder: the folder of the files.
        ending: ending of the files' names.
    """
    if sys.platform != "linux":
        return
    try:
        import ctypes

        maps = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return
    inside = folder.resolve()
    for line in maps:
        if not line.endswith(ending):  # nearly all of thousands
            continue
        addresses, *_, path = line.split(maxsplit=5)
        if Path(path).parent == inside:
            start, end = (int(address, 16) for address in addresses.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def print_any_character() -> None:
    """Makes standard output and error escape characters that their encoding lacks, such as that of a Windows pipe."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and (change := getattr(stream, "reconfigure", None)):
            change(errors="backslashreplace")


def _psutil() -> Any:
    """The psutil package, which this package depends on except on Linux; None if it is missing."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def quote_argument(text: str) -> str:
    """An argument as the system's shell reads it."""
    return subprocess.list2cmdline([text]) if sys.platform == "win32" else shlex.quote(text)
