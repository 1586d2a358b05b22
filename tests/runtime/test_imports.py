"""What may import what, and what the runtime must not pull in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ALLOWED = {
    "runtime": set(),
    "engine": {"runtime"},
    "export": {"runtime"},
    "service": {"runtime"},
    "cli": {"runtime", "engine", "export", "service"},
}

FORMAT = {"bundle", "engines", "errors", "manifest", "staging", "verified", "weights"}
"""What the runtime holds of the format of bundles and engines, and of how their folders are written."""
KEY = {"gpu.device", "gpu.library"}
"""What the key of a GPU's engine names."""
RUN = {"openvino", "sessions"}
"""What runs an engine of OpenVINO, which is compiled at every start: a build compares it as requests will run it."""


def test_the_runtime_is_lean() -> None:
    code = (
        "import sys, sparsectrl_lcm.runtime\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxscript', 'onnxruntime', 'openvino'}\n"
        "heavy &= set(sys.modules)\n"
        "print(*heavy)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_a_request_pulls_in_no_torch() -> None:
    code = (
        "import sys\n"
        "from sparsectrl_lcm.runtime import VideoPipeline\n"
        "VideoPipeline.load(backend='onnxruntime').generate('a boat', num_frames=2, num_inference_steps=1, seed=1)\n"
        "print(*({'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def imports(part: str) -> Iterator[tuple[Path, str]]:
    """Every import of a part from another, as runtime.bundle."""
    for path in (ROOT / part).rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts)  # the level that leaves the part
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                yield path, node.module or ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if name.startswith("sparsectrl_lcm.") and name.split(".")[1] != part:
                    yield path, name.removeprefix("sparsectrl_lcm.")


@pytest.mark.parametrize("part", [part for part in ALLOWED if (ROOT / part).is_dir()])
def test_dependencies_point_one_way(part: str) -> None:
    for path, module in imports(part):
        assert module.split(".")[0] in ALLOWED[part], f"{path} imports {module}"


@pytest.mark.parametrize(("part", "more"), [("engine", KEY | RUN), ("export", set())])
def test_only_the_format_is_taken_from_the_runtime(part: str, more: set[str]) -> None:
    for path, module in imports(part):
        assert module.removeprefix("runtime.") in FORMAT | more, f"{path} imports {module}"
