"""A bundle with a graph that cannot be opened: no runner becomes ready, and the reason is told before any request."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from fakes.emulated_demo import emulated_demo
from sparsectrl_lcm.runtime import BackendError
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.runner import LocalRunner, pipeline_loading

from .runner_jobs import until
from .waiting import SECONDS


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the demo bundle."""
    return Path(shutil.copytree(demo_bundle(), tmp_path / "bundle"))


def spoil(bundle: Path, graph: str) -> None:
    """Makes a graph one that no library can open, with the checksum that it has."""
    file, manifest = bundle / f"onnx/{graph}.onnx", json.loads((bundle / "manifest.json").read_text())
    file.write_bytes(b"no graph" * 100)
    record = manifest["files"][f"onnx/{graph}.onnx"]
    record |= {"bytes": 800, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("graph", ["vae_encoder", "controlnet_rgb", "controlnet_scribble", "vae_decoder_tiny"])
def test_graphs_that_only_some_requests_use(bundle: Path, graph: str) -> None:
    spoil(bundle, graph)
    with pytest.raises(BackendError, match=rf"{graph}\.onnx"):
        pipeline_loading.load(str(bundle), "onnxruntime")


def test_a_device_keeps_no_memory_of_what_was_tried() -> None:
    machine: Any = emulated_demo()
    opened: list[str] = []
    load = machine.loader.open

    def noted(bundle: Any, graph: str, *others: Any) -> Any:
        opened.append(graph)
        return load(bundle, graph, *others)

    machine.loader.open = noted
    before = machine.executor._cuda.memory()
    pipeline_loading.open_graphs(machine.pipeline)
    assert sorted(opened) == sorted(machine.bundle.manifest.graphs)
    assert machine.executor._cuda.memory() == before


def test_a_runner_whose_bundle_is_spoilt_meanwhile(bundle: Path) -> None:
    """Once it was ready, a runner starts again and again; the reason is there for readiness and in the log."""

    async def scenario() -> None:
        runner = LocalRunner(
            pipeline="sparsectrl_lcm.service.runner.pipeline_loading:load", bundle=bundle, backend="onnxruntime"
        )
        await runner.start()
        try:
            await until(lambda: runner.ready, 2 * SECONDS)
            spoil(bundle, "controlnet_rgb")
            os.kill(runner.about["pid"], signal.SIGKILL)
            await until(lambda: "controlnet_rgb.onnx" in str(runner.problem), 2 * SECONDS)
            assert not runner.ready
        finally:
            await runner.stop()

    asyncio.run(scenario())
