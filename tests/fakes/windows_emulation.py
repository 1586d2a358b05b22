"""Run commands on Linux as if on Windows: `python windows_emulation.py '[["doctor"], ...]'`.

For the package's own modules, POSIX-only modules and attributes are missing, the platform is win32 and /proc does not
exist. A file that is open or mapped can be neither renamed nor removed, nor can a folder that contains it. Other
packages still see Linux.
"""

import builtins
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "sparsectrl_lcm"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


POSIX_MODULES = _names("fcntl grp posix pty pwd readline resource syslog termios tty _posixsubprocess _curses curses")
POSIX_ATTRIBUTES = {
    "os": _names(
        "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK WEXITSTATUS WIFSIGNALED chown chroot confstr ctermid eventfd "
        "fchdir fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority "
        "getresuid getsid getuid initgroups killpg lchown lockf major memfd_create minor mkfifo mknod nice openpty "
        "pathconf pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite register_at_fork "
        "sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setpgid setpriority setsid "
        "setuid statvfs sync sysconf sysconf_names tcgetpgrp ttyname uname unshare wait wait3 wait4 waitid"
    ),
    "signal": _names(
        "ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 "
        "alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending "
        "sigwait"
    ),
    "mmap": _names("MADV_DONTNEED MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE"),
}
_REPLACED = {"sys": {"platform": "win32"}, "os": {"name": "nt"}}
_CHANGED = frozenset().union(*POSIX_ATTRIBUTES.values(), *_REPLACED.values())


def emulate() -> None:
    """Makes the package see Windows from now on."""
    import mmap

    for module in (os, signal, mmap, sys):
        module.__class__ = _AsOnWindows
    _hide_modules()
    for name in ("open", "read_bytes", "read_text", "exists"):
        _guard(name, _no_proc)
    for name in ("rename", "replace", "unlink", "rmdir"):
        _guard(name, _not_in_use)


class _AsOnWindows(ModuleType):
    """A module that hides POSIX attributes from the package.

    Python creates new modules with the class of `sys`, so attribute reads of other modules pass through here too.
    """

    def __getattribute__(self, attribute: str) -> Any:
        if attribute in _CHANGED and _asked_by_package(2):
            name = super().__getattribute__("__name__")
            if attribute in POSIX_ATTRIBUTES.get(name, ()):
                raise AttributeError(f"module {name!r} has no attribute {attribute!r} on Windows")
            if attribute in _REPLACED.get(name, ()):
                return _REPLACED[name][attribute]
        return super().__getattribute__(attribute)


def _asked_by_package(depth: int) -> bool:
    """Returns whether the caller, `depth` frames above this one, is a module of the package."""
    try:
        return str(_frame(depth).f_globals.get("__name__", "")).partition(".")[0] == PACKAGE
    except ValueError:  # called by the interpreter as it exits
        return False


_frame = sys._getframe


def _hide_modules() -> None:
    found = builtins.__import__

    def find(name: str, globals: Any = None, *others: Any, **named: Any) -> ModuleType:
        by_package = str((globals or {}).get("__name__", "")).partition(".")[0] == PACKAGE
        if by_package and name.partition(".")[0] in POSIX_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r} on Windows", name=name)
        return found(name, globals, *others, **named)

    builtins.__import__ = find


def _guard(name: str, check: Callable[..., None]) -> None:
    """Calls `check` before a method of `Path`, if the package calls it."""
    method = getattr(Path, name)

    def guarded(path: Path, *arguments: Any, **named: Any) -> Any:
        if _asked_by_package(2):
            check(path, *arguments)
        return method(path, *arguments, **named)

    setattr(Path, name, guarded)


def _no_proc(path: Path, *_: object) -> None:
    if str(path).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "no such folder on Windows", str(path))


def _not_in_use(path: Path, *others: object) -> None:
    used = _used_files()
    for place in (path, *(other for other in others if isinstance(other, str | Path))):
        held = [file for file in used if Path(file).is_relative_to(Path(place).absolute())]
        if held:
            print("in use:", *held, file=sys.stderr)
            raise PermissionError(13, "in use by this process, which Windows refuses", str(place))


def _used_files() -> set[str]:
    """Returns the files that this process has opened or mapped."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        lines = (line.split(maxsplit=5) for line in maps)
        used = {line[5].rstrip("\n").removesuffix(" (deleted)") for line in lines if len(line) == 6}
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            used.add(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        except OSError:
            continue
    return {file for file in used if file.startswith("/")}


if __name__ == "__main__":
    emulate()
    from sparsectrl_lcm.cli import main

    for command in json.loads(sys.argv[1]):
        print(">", command[0], flush=True)
        try:
            main(command)
        except SystemExit as done:
            if done.code:
                raise
