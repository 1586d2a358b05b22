from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import flops as reference
import pytest
from sparsectrl_lcm.engine.check import random_inputs
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize

GRAPHS = ("text_encoder", "vae_encoder", "controlnet_scribble", "controlnet_rgb", "unet", "lcm_update", "vae_decoder")


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    """The benchmark's module, loaded by path, since the reference has the same name."""
    path = Path(__file__).parents[2] / "benchmarks" / "flops.py"
    spec = spec_from_file_location("benchmark_flops", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("graph", GRAPHS)
def test_flops_are_those_of_the_shapes_that_onnx_runtime_saw(flops: ModuleType, graph: str, tmp_path: Path) -> None:
    bundle = Bundle.load()
    feeds = random_inputs(bundle, graph)
    path = bundle.folder / bundle.graph(graph).path
    shapes = {name: values.shape for name, values in feeds.items()}
    expected = reference.count_flops(path, feeds, tmp_path)
    assert (expected > 0) == (graph != "lcm_update")
    assert flops.count_flops(path, shapes) == expected


def test_flops_of_a_request_follow_its_steps_and_size(flops: ModuleType) -> None:
    bundle = Bundle.load()

    def stages(steps: int, frames: int, side: int = 128) -> dict[str, int]:
        size = ClipSize(width=side, height=side, frames=frames)
        counted: dict[str, int] = flops.request_flops(bundle.folder, bundle.manifest, size, steps)
        return counted

    one, four = stages(1, 16), stages(4, 16)
    assert {name: four[name] / one[name] for name in one} == {"text": 1, "control": 4, "denoise": 4, "decode": 1}
    assert stages(1, 8)["decode"] * 2 == one["decode"]
    parts = stages(1, 32, 512)["decode"] / stages(1, 8, 512)["decode"]  # 8 frames are decoded at a time
    assert parts == 4
