"""The cache of compiled graphs: what it forgets, what a graph's file depends on, and graphs that cannot be exported."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.runtime import machine
from sparsectrl_lcm.runtime.cpu import openvino_compile
from sparsectrl_lcm.runtime.cpu.compiled_cache import CompiledGraph, trim
from sparsectrl_lcm.runtime.cpu.openvino import OpenVinoSessions
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle

SIZES = {"batch": 1, "frames": 1, "latent_height": 8, "latent_width": 8}


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the demo bundle, whose sessions no other test shares, and an empty cache in `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))


def open_smallest(demo: Path) -> list[Path]:
    """Opens the smallest graph; returns the compiled graphs on disk."""
    sessions = OpenVinoSessions(Bundle.load(demo))
    sessions.open("lcm_update", SIZES)
    assert sessions.session("lcm_update").shapes["latents"] == (1, 4, 1, 8, 8)
    return sorted((demo.parent / "sparsectrl-lcm/openvino").glob("*.blob"))


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                CompiledGraph(tmp_path, "key").write(b"graph")
    old, new = tmp_path.iterdir()
    os.utime(old, (time.time() - 3700,) * 2)
    trim(tmp_path)
    assert list(tmp_path.iterdir()) == [new], "a process may still write to this one"


def test_another_processor_compiles_anew(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines may report one name for processors with different instruction sets."""
    (first,) = open_smallest(demo)
    assert open_smallest(demo) == [first]
    monkeypatch.setattr(machine, "cpu_fields", lambda name: ["fpu avx2"] if name == "flags" else [])
    assert len(open_smallest(demo)) == 2


def test_a_graph_that_cannot_be_exported_is_used_without_the_cache(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = openvino_compile.core()

    class Unexportable:
        """A compiled model whose plugin exports none."""

        def __init__(self, model: Any) -> None:
            self.create_infer_request = model.create_infer_request

        def export_model(self) -> Any:
            raise RuntimeError("not implemented")

    class Core:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def compile_model(self, *given: Any) -> Unexportable:
            return Unexportable(core.compile_model(*given))

    monkeypatch.setattr(openvino_compile, "core", Core)
    assert open_smallest(demo) == []
