"""Calls on a thread of their own."""

import _thread
import threading
import time

import pytest
from sparsectrl_lcm.runtime.gpu.one_thread import OneThread


def test_results_and_errors_reach_the_caller() -> None:
    thread = OneThread("test")
    idents = {thread.call(threading.get_ident) for _ in range(3)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    with pytest.raises(ValueError, match="abc"):
        thread.call(int, "abc")


@pytest.mark.usefixtures("raising")
def test_an_interrupt_reaches_the_caller_when_the_call_is_done() -> None:
    """The caller then frees memory that the call uses."""
    done = []

    def work() -> None:
        time.sleep(0.1)  # until the caller waits
        _thread.interrupt_main()
        time.sleep(0.1)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        OneThread("test").call(work)
    assert done == [True]
