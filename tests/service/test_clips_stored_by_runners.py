"""Clips that a runner on another machine writes to the object store itself."""

from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.service import clock
from sparsectrl_lcm.service.components import Service
from sparsectrl_lcm.service.objects.object_stores import open_files
from sparsectrl_lcm.service.objects.stored_files import remove_expired_files
from sparsectrl_lcm.service.queue import dispatcher
from sparsectrl_lcm.service.runner import Job, JobFailed, Made, RunnerLost
from sparsectrl_lcm.service.settings import DAY
from sparsectrl_lcm.service.store import FileRow

from .stand_in import StandIn, ended, serving, submit


@pytest.fixture(autouse=True)
def _reached_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "on_every_machine", lambda url: url.startswith("memory://"))


def test_a_clip_that_its_runner_has_stored_is_not_stored_again(tmp_path: Path) -> None:
    """A runner on another machine gets the place of the clip in an object store that both reach."""

    async def scenario(service: Service, runner: StandIn) -> None:
        async def stores(given: Job, _: Any) -> Made:
            runner.jobs.append(given)
            return Made(1, 0.1, {"total": 0.1}, 16, stored=7)

        runner.run = stores  # type: ignore[method-assign]
        await submit(service, "a")
        outcome = await ended(service, "a")
        video = outcome.body["video"]
        assert (outcome.status, video["file_size"]) == (200, 7)
        row = service.store.get_file(video["url"].split("/")[-2])
        assert row is not None and (row.size, runner.jobs[0].place) == (7, ("memory://clips", row.object_name))

    serving(tmp_path, scenario, files="memory://clips")


@pytest.mark.parametrize("end", [RunnerLost("crashed", "the stream broke"), JobFailed("cancelled", "cancelled")])
def test_a_stored_clip_is_swept_if_its_runner_never_said_so(end: Exception, tmp_path: Path) -> None:
    """Its record stays without a size until the sweep deletes its object."""

    def records(service: Service) -> list[FileRow]:
        return service.store.expired_files(clock.now() + 2 * DAY)

    async def scenario(service: Service, runner: StandIn) -> None:
        async def stores(given: Job, _: Any) -> Made:
            assert given.place is not None
            url, name = given.place
            open_files(url).put(name, b"the clip")
            raise end

        runner.run = stores  # type: ignore[method-assign]
        await submit(service, "a", retry=False)
        assert (await ended(service, "a")).status != 200
        (row,) = records(service)
        assert service.files.open(row.object_name).read() == b"the clip"
        remove_expired_files(service, clock.now() + 2 * DAY)
        assert records(service) == []
        with pytest.raises(FileNotFoundError):
            service.files.open(row.object_name)

    serving(tmp_path, scenario, files="memory://clips-of-lost-runners")


def test_a_clip_that_its_runner_has_not_stored_is_stored_here(tmp_path: Path) -> None:
    async def scenario(service: Service, _: StandIn) -> None:
        await submit(service, "a")
        video = (await ended(service, "a")).body["video"]
        row = service.store.get_file(video["url"].split("/")[-2])
        assert row is not None and (row.size, service.files.open(row.object_name).read()) == (4, b"clip")

    serving(tmp_path, scenario, files="memory://clips-by-value")
