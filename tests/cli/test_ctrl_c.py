"""Ctrl-C while `generate` makes a clip: within a step, and where a library cannot be interrupted."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sparsectrl_lcm.cli.ctrl_c import interruptible
from sparsectrl_lcm.runtime.cpu.graph_runs import RUNS
from sparsectrl_lcm.runtime.errors import BackendError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot press Ctrl-C for another one")

SECONDS = 120
STOPPING = "stopping; press Ctrl-C again to end at once\n"
BEGIN = """
import signal, sys
from sparsectrl_lcm import cli
from sparsectrl_lcm.cli.progress_bar import Bar
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
"""
IN_A_STEP = f"""{BEGIN}
import os, threading, time
from sparsectrl_lcm.runtime import VideoPipeline
run = VideoPipeline.run

def run_and_tell(*arguments, **named):
    try:
        return run(*arguments, **named)
    except BaseException as error:
        while error is not None:
            print(type(error).__name__, error, flush=True)
            error = error.__cause__ or error.__context__
        raise

def of_clip(bar, done):
    print(done.stage, done.step, flush=True)
    if (done.stage, done.step) == ("denoise", 0):
        threading.Thread(target=press, daemon=True).start()

def press():
    while not (found := place()) or (time.sleep(0.005), place())[1] != found:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

def place():  # where the main thread waits for the library to run the UNet, which takes longest
    frame = sys._current_frames()[threading.main_thread().ident]
    file = os.path.basename(frame.f_code.co_filename)
    if file not in ("openvino.py", "onnxruntime_inference_collection.py"):
        return None
    feeds = frame.f_locals.get("arrays" if file == "openvino.py" else "input_feed")
    return isinstance(feeds, dict) and "prompt_embeds" in feeds and (id(frame), frame.f_lasti)

VideoPipeline.run, Bar.of_clip = run_and_tell, of_clip
cli.main(sys.argv[1:])
"""
IN_A_LIBRARY = f"""{BEGIN}
import hashlib
from threading import Event
from sparsectrl_lcm.runtime.output import video
encoding = Event()

def compute():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # for minutes; it does not look for signals

def encode(*_):
    encoding.set()
    compute()

def of_clip(bar, done):
    if (done.stage, done.step) == ("decode", 1):
        encoding.wait()
        print("computing", flush=True)
        compute()

video.encode, Bar.of_clip = encode, of_clip
cli.main(sys.argv[1:])
"""


@contextmanager
def generating(script: str, output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `generate` by a script; it is killed if it takes too long."""
    command = [sys.executable, "-c", script, "generate", "--prompt", "a star", "-o", str(output), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"COLUMNS": "200"}) as process:
        killer = threading.Timer(SECONDS, process.kill)
        killer.start()
        try:
            yield process
        finally:
            killer.cancel()
            process.kill()


@pytest.mark.parametrize(("backend", "reason"), [("onnxruntime", "terminate flag being set"), ("openvino", "cancel")])
def test_a_step_is_left_unfinished(backend: str, reason: str, tmp_path: Path) -> None:
    with generating(IN_A_STEP, tmp_path / "clips/a.mp4", "--backend", backend, "--threads", "1") as process:
        out, err = process.communicate()
    assert process.returncode == 130
    assert reason in out  # the library ended the run itself
    assert "denoise 1" not in out
    *warnings, end = err.replace(STOPPING, "").splitlines()  # a busy machine may take long for the operator that runs
    assert (len(warnings), end) == (1, "stopped"), "the demo model was trained with three keyframes"
    assert not list(tmp_path.iterdir())


def test_a_second_press_ends_the_process_while_a_library_computes(tmp_path: Path) -> None:
    """On the main thread, which gets no KeyboardInterrupt, and on that which encodes."""
    options = ("--backend", "onnxruntime", "--size", "64x64", "--frames", "2", "--steps", "1")
    with generating(IN_A_LIBRARY, tmp_path / "a.mp4", *options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "computing\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        assert STOPPING in iter(process.stderr.readline, "")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert (out, err) == ("", "stopped\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("raising")
def test_an_error_after_ctrl_c_gives_way_to_it() -> None:
    """Such as that of the graph which was ended, if a library has swallowed the KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as ended, interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise BackendError("", "the graph was ended")
    assert isinstance(ended.value.__cause__, BackendError)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert not RUNS.stopped


@pytest.mark.usefixtures("raising")
def test_a_block_without_ctrl_c_raises_its_own_error() -> None:
    with pytest.raises(BackendError), interruptible():
        raise BackendError("", "no graph")
