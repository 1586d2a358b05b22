"""A backend is one module and one record; nothing else branches on its name."""

import ast
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.runtime import BackendError, VideoPipeline, backend_interface, backends
from sparsectrl_lcm.runtime.backends import BACKENDS, Backend, choose_backend
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec
from sparsectrl_lcm.runtime.load_options import LoadOptions

ROOT = Path(__file__).parent.parent.parent
OWN_MODULES = {
    "runtime/backends.py",
    "runtime/cpu/onnxruntime.py",
    "runtime/cpu/openvino.py",
    "runtime/cpu/openvino_library.py",
    "runtime/gpu/onnxruntime.py",
    "runtime/gpu/tensorrt_library.py",
}
"""The registry, and modules of backends that may contain their own name."""
PARTS = ("runtime", "engine", "export", "cli", "service", "benchmarks/harness")


class ToyExecutor:
    """Makes grey frames."""

    backend, precision = "toy", "fp4"

    def run(
        self, request: Any, on_progress: Any, on_frames: Any = None, on_preview: Any = None
    ) -> tuple[Any, dict[str, float]]:
        return np.full((request.frames, request.height, request.width, 3), 128, np.uint8), {"total": 0.0}

    def in_one_piece(self, size: Any) -> bool:
        return True

    def refit(self, weights: Bundle | None) -> None:
        raise AssertionError

    def close(self) -> None:
        pass


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A backend that comes first, with its own module and builder."""
    module, builder = ModuleType("toy"), ModuleType("toy")
    module.__dict__.update(
        find_version=lambda name: "1.2",
        check_machine=backend_interface.any_machine,
        open_executor=lambda name, bundle, options: ToyExecutor(),
        engine_scope=backend_interface.unbound_scope,
        computes_in=lambda precision: True,
        notes=lambda found: ["made of grey"],
    )
    monkeypatch.setitem(sys.modules, "sparsectrl_lcm.runtime.toy", module)
    builder.__dict__.update(build=build_toy)
    monkeypatch.setitem(sys.modules, "sparsectrl_lcm.engine.toy", builder)
    record = Backend("toy", False, ("fp4",), "pip install toy", "toy", "toy", ("toy",), portable=True)
    others = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update({"toy": record, **others})
    yield record
    BACKENDS.clear()
    BACKENDS.update(others)


def build_toy(bundle: Bundle, backend: str, options: Any, on_progress: Any) -> EngineIndex:
    from sparsectrl_lcm.engine.engine_writer import SetBuild, any_size_spec, engine_record, write_set

    def spec(graph: str) -> EngineSpec:
        return any_size_spec(bundle, graph, backend, "fp4", "1.2")

    def make(graph: str, folder: Path, report: Any) -> EngineRecord:
        (folder / f"{graph}.toy").write_bytes(b"grey")
        return engine_record(folder / f"{graph}.toy", spec(graph), {})

    index = EngineIndex(backend=backend, precision="fp4", engines={})
    return write_set(bundle, SetBuild(index, ["unet"], spec, make), options, on_progress)


@pytest.mark.usefixtures("toy")
def test_every_command_knows_a_new_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bundle = Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))

    def said(*arguments: object, code: int = 0) -> str:
        assert run([str(argument) for argument in arguments]) == code
        streams = capsys.readouterr()
        return streams.out + streams.err

    text = said("doctor")
    assert "toy: made of grey" in text
    assert "takes the first of toy, " in text
    command = f"sparsectrl-lcm generate --bundle {bundle} --backend toy --prompt ... -o clip.mp4"
    assert f"toy fp4: 1 engines\ntry `{command}`\n" in said("build", bundle, "--backend", "toy")
    assert "toy fp4 in" in said("inspect", bundle)
    told = said("generate", "--bundle", bundle, "--prompt", "a boat", "-o", tmp_path / "clip.gif")
    assert "toy fp4 (auto: the fastest that can run here)\n" in told
    assert "allowed are auto, toy, " in said("generate", "--backend", "x", "--prompt", "a", "-o", "x.gif", code=2)
    wrong = said("build", bundle, "--backend", "toy", "--precision", "fp16", code=2)
    assert "--precision: 'fp16' is not one of toy; allowed are fp4" in wrong
    assert "--refit: not an option of toy" in said("build", bundle, "--backend", "toy", "--refit", code=2)


@pytest.mark.usefixtures("toy")
def test_auto_and_bench_choose_a_new_backend(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sparsectrl_lcm.engine.build import build

    opened = Bundle.load(Path(shutil.copytree(demo_bundle(), tmp_path / "bundle")))
    assert choose_backend(opened) == "toy"
    assert VideoPipeline.load(opened.folder).backend == "toy"
    assert choose_backend(opened, LoadOptions(precision="int8")) == "openvino"
    built = build(opened, "toy")
    assert built.index.precision == "fp4"
    assert backends.can_run(opened, "toy", "fp4")
    assert choose_backend(opened, LoadOptions(precision="fp4")) == "toy"
    sys.modules["sparsectrl_lcm.runtime.toy"].__dict__["find_version"] = lambda name: "1.3"
    assert not backends.can_run(opened, "toy", "fp4")
    assert f"run: sparsectrl-lcm build {opened.folder} --backend toy --precision fp4" in caplog.text
    with pytest.raises(BackendError, match="threads: only for openvino, onnxruntime; leave it out for toy"):
        VideoPipeline.load(opened.folder, "toy", threads=2)


def strings(path: Path) -> Mapping[int, str]:
    """The string constants of a file except its docstrings, by line."""
    return {
        node.lineno: node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("part", PARTS)
def test_nothing_but_its_own_module_names_a_backend(part: str) -> None:
    for path in (ROOT / part).rglob("*.py"):
        if path.relative_to(ROOT).as_posix() in OWN_MODULES:
            continue
        named = {line: text for line, text in strings(path).items() if text in BACKENDS}
        assert not named, f"{path} names a backend"
