"""Engines of each release's fake TensorRT, built once for the tests of a file."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.tensorrt_builds import RELEASES, Workshop, small_copy
from fakes.tensorrt_process import Opened, Process


@pytest.fixture(scope="module", autouse=True)
def _cache_of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        yield


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def built(release: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines, which are only read."""
    bundle = small_copy(tmp_path_factory.mktemp("built"))
    Workshop(release).build(bundle)
    return bundle


@pytest.fixture
def process(release: str, built: Path) -> Process:
    return Process(release, built)


@pytest.fixture
def opened(process: Process) -> Opened:
    return process.open()


@pytest.fixture
def spoilt(release: str, built: Path, tmp_path: Path) -> Process:
    """A process whose bundle and engines a test may change."""
    copied = shutil.copytree(built, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.kernels"))
    return Process(release, Path(copied))
