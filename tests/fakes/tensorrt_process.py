"""Engines of a fake TensorRT, opened as a new process does, on an emulated stream."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes.gpu_emulation import EmulatedCudart
from fakes.tensorrt_builds import H200, SIZE, Workshop
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize, static_shapes
from sparsectrl_lcm.runtime.gpu.cuda import Cuda
from sparsectrl_lcm.runtime.gpu.device import Device
from sparsectrl_lcm.runtime.gpu.tensorrt import TensorRtEngine, TensorRtLoader

GRAPH = "vae_decoder"


@dataclass
class Opened:
    """An open engine and everything it was opened with."""

    workshop: Workshop
    bundle: Bundle
    cudart: EmulatedCudart
    cuda: Cuda
    loader: TensorRtLoader
    engine: TensorRtEngine


@dataclass
class Process:
    """A new process with all that is needed to open engines.

    Attributes:
        shapes: shapes that replace those of the size.
    """

    release: str
    bundle: Path
    size: ClipSize = SIZE
    device: Device = H200
    version: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.workshop = Workshop(self.release, self.version)
        self.loader = TensorRtLoader(self.workshop.library, self.device)
        self.cudart = EmulatedCudart()

    def open(self, graph: str = GRAPH) -> Opened:
        """Opens an engine and gives it activation memory, so that it can run."""
        opened = self.load(graph)
        opened.engine.use_activation(4096, opened.engine.activation_bytes)
        return opened

    def load(self, graph: str = GRAPH) -> Opened:
        """Opens an engine without activation memory."""
        bundle, cuda = Bundle.load(self.bundle), Cuda(self.cudart)
        shapes = static_shapes(bundle.manifest, graph, self.size) | self.shapes
        engine = self.loader.open(bundle, graph, self.size, shapes, cuda)
        return Opened(self.workshop, bundle, self.cudart, cuda, self.loader, engine)

    @property
    def folder(self) -> Path:
        return self.workshop.folder(self.bundle, size=self.size)

    def refuses(self, reason: str, *options: str) -> None:
        """Expects an error before TensorRT sees the file: one line that ends with the command to rebuild the engine."""
        with pytest.raises(BackendError, match=reason) as error:
            self.open()
        command = (
            f"sparsectrl-lcm build {self.bundle} --backend {self.workshop.backend} "
            f"--size {self.size.width}x{self.size.height} --frames {self.size.frames} --precision fp16"
        )
        assert str(error.value).endswith(f"; run: {' '.join([command, *options])}")
        assert "\n" not in str(error.value)
        assert self.workshop.calls("Runtime.deserialize_cuda_engine") == []


def one_line(error: pytest.ExceptionInfo[BackendError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
