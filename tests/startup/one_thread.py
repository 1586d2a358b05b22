"""ONNX Runtime and OpenVINO compute with one thread wherever no other number is asked for.

The test workers fill the cores. A thread per core in each of them would mostly spin while it waits for its turn, which
costs half of the processor time.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

TYPE_CHECKING = False
if TYPE_CHECKING:  # every program that the tests start imports this module: it has to be quick
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["compute_with_one_thread"]


def compute_with_one_thread() -> None:
    """Changes both packages when they are first imported, in this process."""
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds a package with the finders behind it, and has it changed once it is loaded."""

    def __init__(self) -> None:
        self._changes = {"onnxruntime": _change_onnxruntime, "openvino": _change_openvino}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not (change := self._changes.pop(name, None)):
            return None
        spec = find_spec(name)  # asks this finder, too
        self._changes[name] = change
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader, change)
        return spec


class _Loader:
    def __init__(self, loader: Loader, change: Any) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        self._change(module)


def _change_onnxruntime(onnxruntime: Any) -> None:
    session = onnxruntime.InferenceSession
    original = session.__init__

    def create(self: Any, path: Any, sess_options: Any = None, *arguments: Any, **options: Any) -> None:
        sess_options = sess_options or onnxruntime.SessionOptions()
        sess_options.intra_op_num_threads = sess_options.intra_op_num_threads or 1
        original(self, path, sess_options, *arguments, **options)

    session.__init__ = create


def _change_openvino(openvino: Any) -> None:
    core = openvino.Core
    original = core.compile_model

    def compile_model(self: Any, model: Any, device_name: Any = None, config: Any = None, **options: Any) -> Any:
        if device_name == "CPU":
            config = {"INFERENCE_NUM_THREADS": 1, **(config or {})}
        return original(self, model, device_name, config, **options)

    core.compile_model = compile_model
