"""A toy backend's builds, which can be stopped at any graph."""

from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.engine.engine_writer import SetBuild, any_size_spec, engine_record, write_set
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.build_options import BuildOptions
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec

GRAPHS = ["text_encoder", "unet", "lcm_update", "vae_decoder"]


class Toy:
    """Writes engines of a backend with a text in them.

    Attributes:
        made: the graphs whose engines were made.
        fails_at: raises an error at this graph.
    """

    def __init__(self, bundle: Path, version: str = "1", types: str = "fp32") -> None:
        self.bundle = Bundle.load(bundle)
        self.version = version
        self.types = types
        self.made: list[str] = []
        self.fails_at: str | None = None

    def build(self, **options: Any) -> EngineIndex:
        index = EngineIndex(backend="openvino", precision="fp32", engines={})
        return write_set(
            self.bundle,
            SetBuild(index, GRAPHS, self._spec, self._make, {"types": self.types}),
            BuildOptions(**options),
            lambda text, fraction: None,
        )

    def stop(self, graph: str, **options: Any) -> None:
        """Builds until a graph fails."""
        self.fails_at = graph
        with pytest.raises(BackendError, match=f"no {graph}"):
            self.build(**options)
        self.fails_at = None
        self.made.clear()

    def text(self, graph: str) -> str:
        return (self.bundle.folder / "engines/openvino/fp32" / f"{graph}.onnx").read_text()

    def _spec(self, graph: str) -> EngineSpec:
        return any_size_spec(self.bundle, graph, "openvino", "fp32", self.version)

    def _make(self, graph: str, folder: Path, report: Any) -> EngineRecord:
        (folder / f"{graph}.weights").write_text("beside it")
        if graph == self.fails_at:
            raise BackendError("build", f"no {graph}")
        self.made.append(graph)
        path = folder / f"{graph}.onnx"
        path.write_text(f"{graph} {self.version}")
        return engine_record(path, self._spec(graph), {}, path.with_suffix(".weights"))


def names(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "engines/openvino").iterdir())
