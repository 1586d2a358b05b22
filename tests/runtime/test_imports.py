"""What may import what, and what the runtime must not pull in."""

import ast
import subprocess
import sys
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

BUNDLE_FORMAT = ("runtime.manifest", "runtime.errors", "runtime.bundle", "runtime.engines")


def test_the_runtime_is_lean() -> None:
    code = (
        "import sys, sparsectrl_lcm.runtime\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxscript', 'onnxruntime'} & set(sys.modules)\n"
        "print(*heavy)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_a_request_pulls_in_no_torch() -> None:
    code = (
        "import sys\n"
        "from sparsectrl_lcm.runtime import VideoPipeline\n"
        "VideoPipeline.load().generate('a boat', num_frames=2, num_inference_steps=1, seed=1)\n"
        "print(*({'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("part", [part for part in ALLOWED if (ROOT / part).is_dir()])
def test_dependencies_point_one_way(part: str) -> None:
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                other = (node.module or "").split(".")[0]
                assert other in ALLOWED[part], f"{path} imports {other}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if name.startswith("sparsectrl_lcm."):
                    assert name.split(".")[1] in ALLOWED[part] | {part}, f"{path} imports {name}"


@pytest.mark.parametrize("part", ["engine", "export"])
def test_only_the_bundle_format_is_taken_from_the_runtime(part: str) -> None:
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and (node.module or "").startswith("runtime"):
                assert node.module in ("runtime.manifest", "runtime.errors", "runtime.bundle", "runtime.engines"), (
                    f"{path}: {node.module}"
                )
