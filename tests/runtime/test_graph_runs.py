"""Graphs that are ended by another thread while they run; tests/cli/test_ctrl_c.py ends real ones."""

import pytest
from sparsectrl_lcm.runtime import BackendError, Cancelled
from sparsectrl_lcm.runtime.cpu.graph_runs import GraphRuns


def test_a_stop_ends_what_runs_and_refuses_the_rest() -> None:
    runs, cancelled = GraphRuns(), []
    with pytest.raises(Cancelled, match="while a graph ran") as error, runs.cancellable(lambda: cancelled.append(1)):
        runs.stop()
        raise BackendError("", "the library ended the run")
    assert isinstance(error.value.__cause__, BackendError)
    with pytest.raises(Cancelled, match="before a graph ran"), runs.cancellable(lambda: cancelled.append(2)):
        pytest.fail("it ran")
    runs.stop()
    assert cancelled == [1]
    runs.resume()
    with runs.cancellable(lambda: cancelled.append(3)):
        pass


def test_a_run_that_failed_by_itself_keeps_its_error() -> None:
    with pytest.raises(BackendError), GraphRuns().cancellable(lambda: None):
        raise BackendError("", "the graph failed")
