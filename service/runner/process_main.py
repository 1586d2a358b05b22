"""The program of the runner's process: loads the pipeline, then makes one clip after the other.

`python -m sparsectrl_lcm.service.runner.process_main FD` exchanges lines of JSON over the socket FD. It receives one
`load`, then `make` and `cancel` with the number of a job. It sends `ready`; for each job `step`, and `preview` if it
wants them, `encoding` once the pipeline is free for the next job, and at the end `made` or `failed`; and `ended` if
only a new process can go on. `ended` has a `refusal` if no process can. The output of libraries goes to the server's
log.
"""

import faulthandler
import os
import signal
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ...runtime import DeviceLost, DeviceOutOfMemory, SparseCtrlLcmError
from ...runtime.errors import first_line
from .clip_jobs import ClipOrder, Jobs, about
from .interface import REFUSALS
from .process_channel import Channel


def refusal_of(error: Exception) -> dict[str, str] | None:
    """Describes an error in the options, which every process would meet; returns None for other errors.

    Returns:
        kind (a name in `REFUSALS`), field, reason and remedy.
    """
    if isinstance(error, DeviceLost | DeviceOutOfMemory):
        return None  # the next attempt may succeed
    for kind, known in REFUSALS.items():
        if isinstance(error, known):
            return {"kind": kind, "field": error.field, "reason": error.reason, "remedy": error.remedy}
    return None


def load(pipeline: str, options: dict[str, Any]) -> Any:
    """Calls the `module:callable` with the options and returns its result."""
    module, _, names = pipeline.partition(":")
    make: Any = import_module(module)
    for name in names.split("."):
        make = getattr(make, name)
    return make(**options)


def live_and_die_with_the_server() -> None:
    """Ties this process to the server: it ignores the signals of the process group and ends when the server dies."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group, but the server drains first
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, ctypes.c_ulong(signal.SIGKILL))
    with suppress(OSError):  # if memory runs out, the system should kill this process, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    """Makes clips until the server or the device is lost."""
    if sys.platform == "win32":
        raise RuntimeError("the service needs Linux or macOS")
    faulthandler.enable()
    live_and_die_with_the_server()
    channel = Channel(int(sys.argv[1]))
    setup = channel.orders.get()
    os.nice(setup["nice"])
    try:
        pipeline = load(setup["pipeline"], setup["options"])
        jobs = Jobs(pipeline, setup["image_pixels"])
        channel.say("ready", about=about(pipeline))
    except Exception as error:
        if not isinstance(error, SparseCtrlLcmError):
            traceback.print_exc()
        return channel.say("ended", message=f"could not load: {first_line(error)}", refusal=refusal_of(error))
    while True:
        order = channel.orders.get()
        try:
            names = ("options", "keyframes", "output", "previews", "fps")
            jobs.make(order.pop("reports"), ClipOrder(**{name: order[name] for name in names}))
        except DeviceLost as error:
            traceback.print_exc()
            jobs.finish()
            return channel.say("ended", message=f"lost its device: {first_line(error)}", refusal=None)


if __name__ == "__main__":
    main()
    os._exit(1)  # skips exit handlers, which may wait for a device that is gone
