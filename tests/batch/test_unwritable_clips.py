"""Clips that cannot be written fail alone, and a full disk ends the batch: with one pipeline, and with those on Ray."""

from pathlib import Path

import pytest
from fakes.quick_executor import quick_pipeline
from fakes.ray_in_process import RayInProcess
from sparsectrl_lcm.batch import ray_pipelines
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest

from .conftest import SMALL, Ran, batch, clips, results, write

ON_RAY = ("--pool", "ray", "--gpus-per-replica", "0")


@pytest.fixture(autouse=True)
def _ray_in_process(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pipelines, "join_cluster", lambda _: RayInProcess())


@pytest.mark.parametrize("pool", [(), ON_RAY])
def test_a_clip_that_cannot_be_written_fails_alone(monkeypatch: pytest.MonkeyPatch, pool: tuple[str, ...]) -> None:
    def take_name(request: CheckedRequest) -> None:
        """Takes the name of the second clip while it is made."""
        if request.seed == 1:
            Path("out/000002.gif").mkdir()

    monkeypatch.setattr(VideoPipeline, "load", lambda *_, **__: quick_pipeline(take_name))
    write(*(SMALL | {"seed": seed} for seed in range(3)))
    assert batch(*pool) == 1
    assert {item["id"]: item["status"] for item in results()} == {"000001": "done", "000002": "error", "000003": "done"}
    (error,) = (item["error"] for item in results() if "error" in item)
    assert error["field"] == "output" and error["reason"].startswith("'out/000002.gif' ")


def test_a_full_disk_ends_a_batch_on_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As it ends one of a single pipeline."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write(*(SMALL | {"seed": seed} for seed in range(9)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert batch(*ON_RAY) == 2
    assert capsys.readouterr().err.endswith("'out/000001.gif' cannot be written: No space left on device\n")
    assert not Path("out").exists()
    assert batch(*ON_RAY) == 0
    assert len(clips()) == 9


def test_a_picture_with_a_name_that_no_file_can_have_fails_alone() -> None:
    write(SMALL | {"keyframes": [{"index": 0, "image": "a\0.png"}]}, SMALL)
    assert batch(*ON_RAY) == 1
    assert [item["status"] for item in results()] == ["error", "done"]
