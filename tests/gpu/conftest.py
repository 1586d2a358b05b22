"""Fixtures of the GPU tests. These need pytest and the tested backends, but neither torch nor diffusers."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.backends import availability
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.runtime.gpu.device import Device, probe

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")

Load = Callable[..., VideoPipeline]


class Engines:
    """Copies of the demo bundle with engines of its default size, built once per session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built: dict[str, Path | BackendError] = {}

    def bundle(self, backend: str, precision: str = "fp16", refit: bool = False) -> Path:
        """Returns the copy with engines of a backend. If the build has failed, raises its error at each call."""
        from sparsectrl_lcm.engine.build import build

        name = f"{backend}-{precision}" + ("-refit" if refit else "")
        if name not in self.built:
            folder = Path(shutil.copytree(demo_bundle(), self.folder / name))
            try:
                build(folder, backend, BuildOptions(precision=precision, check=False, refit=refit))
                self.built[name] = folder
            except BackendError as error:
                self.built[name] = error
        found = self.built[name]
        if isinstance(found, BackendError):
            raise found
        return found


@pytest.fixture(scope="session", autouse=True)
def device() -> Device:
    """The GPU; skips all tests here if there is none."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # ONNX Runtime's provider would round fp32 products to TF32
    try:
        return probe()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: Device) -> str:
    """Each backend that can run here."""
    found = availability(request.param)
    if found.reason is not None:
        pytest.skip(f"{request.param}: {found.reason}")
    return str(request.param)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def load(engines: Engines, backend: str) -> Iterator[Load]:
    """Opens pipelines on the backend and closes them after the test."""
    opened: list[VideoPipeline] = []

    def load(precision: str = "fp16", refit: bool = False, **options: Any) -> VideoPipeline:
        opened.append(VideoPipeline.load(engines.bundle(backend, precision, refit), backend, **options))
        return opened[-1]

    yield load
    for pipeline in opened:
        pipeline.close()
