"""Runs a plan with TensorRT's own objects and Polygraphy's buffers, without the runtime of this project.

If a plan gives wrong results here too, the fault is in the plan; if only the runtime's results are wrong, it is there.
"""

import sys
from typing import Any

from polygraphy import config

from ...runtime.backends import BACKENDS
from ...runtime.errors import BackendError
from ...runtime.format.bundle import Bundle
from ...runtime.format.clip_layout import ClipSize, static_shapes
from ...runtime.format.engine_sets import EngineSet
from ...runtime.gpu.tensorrt_library import Library, load_library


def library_runner(bundle: Bundle, engines: EngineSet, graph: str, size: ClipSize, name: str) -> Any:
    """Polygraphy's `TrtRunner` on the plan that the runtime loads.

    Args:
        bundle: the bundle.
        engines: the set with the plan.
        graph: name of the graph.
        size: of the clips.
        name: of the runner.

    Raises:
        BackendError: the plan must not be loaded here, or has no weights of its own.
    """
    library = load_library(engines.index.backend)
    spec = engines.index.engines[graph].spec
    if spec.flags.get("strip_weights"):
        raise BackendError("verify", "the plan has no weights of its own", "build it without --strip-weights")
    scope = BACKENDS[library.backend].implementation.engine_scope(library.backend, spec, library.version)
    shapes = static_shapes(bundle.manifest, graph, size)
    path = engines.open(
        bundle.manifest, graph, *scope, inputs={item.name: shapes[item.name] for item in bundle.graph(graph).inputs}
    )

    def engine() -> Any:
        runtime = library.module.Runtime(library.logger)
        if spec.flags.get("version_compatible"):
            runtime.engine_host_code_allowed = True
        return library.call(f"cannot load {path.name}", runtime.deserialize_cuda_engine, path.read_bytes())

    # Plans for TensorRT-RTX require that the caller allocates the activations.
    strategy = "profile" if library.is_rtx else "static"
    return _trt_runner(library)(engine, name=name, allocation_strategy=strategy)


def _trt_runner(library: Library) -> Any:
    """Polygraphy's runner class; has to be imported after the choice between TensorRT and TensorRT-RTX."""
    config.USE_TENSORRT_RTX = library.is_rtx
    if library.is_rtx:
        sys.modules.setdefault("tensorrt_rtx", library.module)  # Polygraphy does not know the bindings' name
    from polygraphy.backend.trt import TrtRunner

    return TrtRunner
