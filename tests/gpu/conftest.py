"""Fixtures of the GPU tests. They need pytest and one of the GPU backends, or torch in the place of one."""

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime import VideoPipeline, backends
from sparsectrl_lcm.runtime.backend_interface import Executor
from sparsectrl_lcm.runtime.backends import availability
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.gpu.captures import GraphCache
from sparsectrl_lcm.runtime.gpu.device import Device, probe
from sparsectrl_lcm.runtime.gpu.executor import GpuExecutor
from sparsectrl_lcm.runtime.load_options import LoadOptions

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
TORCH = "torch"
"""Not a backend: torch runs the graphs of TensorRT's engines, so that the loop can be tested on any GPU."""

Load = Callable[..., VideoPipeline]


class Engines:
    """Copies of the demo bundle with engines of its default size, built once per session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built: dict[str, Path | BackendError] = {}

    def bundle(self, backend: str, precision: str = "fp16", refit: bool = False) -> Path:
        """Returns the copy with engines of a backend. If the build has failed, raises its error at each call."""
        if backend == TORCH:
            return demo_bundle()
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


@pytest.fixture(scope="session", params=(TORCH, *BACKENDS))
def backend(request: pytest.FixtureRequest, device: Device) -> str:
    """Each backend that can run here, and torch."""
    reason = why_not_torch() if request.param == TORCH else availability(request.param).reason
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def why_not_torch() -> str | None:
    """Why torch cannot take the place of a backend; None if it can."""
    for name in ("torch", "onnx_ir"):
        if find_spec(name) is None:
            return f"{name} is not installed"
    import torch
    from torch_engines.streams import missing_name

    if not torch.cuda.is_available():
        return "this build of torch has no CUDA"
    return f"torch {torch.__version__} has no {name}" if (name := missing_name()) else None


def open_executor(bundle: Bundle, backend: str, precision: str, refit: bool = False, **options: Any) -> Executor:
    """Opens a bundle on a backend, or on torch."""
    if backend != TORCH:
        return backends.open_executor(bundle, backend, LoadOptions(**options))
    from torch_engines.loader import TorchLoader

    given = LoadOptions(**options)
    return GpuExecutor(bundle, TorchLoader(precision, refit=refit), given.kept_bytes, cuda_graphs=given.cuda_graphs)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def load(engines: Engines, backend: str) -> Iterator[Load]:
    """Opens pipelines on the backend and closes them after the test."""
    opened: list[VideoPipeline] = []

    def load(precision: str = "fp16", refit: bool = False, **options: Any) -> VideoPipeline:
        bundle = Bundle.load(engines.bundle(backend, precision, refit))
        opened.append(VideoPipeline(bundle, open_executor(bundle, backend, precision, refit, **options)))
        return opened[-1]

    yield load
    for pipeline in opened:
        pipeline.close()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records for each request whether a CUDA graph was replayed."""
    seen: list[bool] = []
    replay = GraphCache.replay

    def watched(cache: GraphCache, *arguments: Any) -> bool:
        seen.append(replay(cache, *arguments))
        return seen[-1]

    monkeypatch.setattr(GraphCache, "replay", watched)
    return seen
