"""What may import what, and what the runtime must not pull in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ALLOWED = {
    "sparsectrl_lcm": {"runtime", "cli"},
    "runtime": set(),
    "engine": {"runtime"},
    "export": {"runtime"},
    "service": {"runtime"},
    "benchmarks/harness": {"runtime"},
    "cli": {"runtime", "engine", "export", "service", "benchmarks"},
}
SHARED = ("runtime.format", "runtime.errors")
"""What `engine` and `export` may take from the runtime."""
EXCEPTIONS = {
    "runtime.gpu.device": "an engine's key names the GPU",
    "runtime.gpu.tensorrt_library": "the library that builds engines is the one that loads them",
    "runtime.cpu.openvino": "a build compares an engine as OpenVINO will run it",
    "runtime.cpu.sessions": "the seam that calibration watches",
    "runtime.backends": "the registry names precisions and builders",
    "runtime.example_requests": "int8 is calibrated on them",
    "runtime.gpu.engine_scope": "what an engine is bound to is part of its key",
}
"""What `engine` takes besides, and why."""


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
    """Every module of another part that a part imports, as runtime.format.bundle."""
    for path in (ROOT / part).rglob("*.py"):
        package = list(path.relative_to(ROOT).parent.parts)
        if part == "sparsectrl_lcm":
            package = package[1:]
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                modules = [".".join([*base, *([node.module] if node.module else [])])]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            absolute = not (isinstance(node, ast.ImportFrom) and node.level)
            for module in modules:
                if absolute and not module.startswith("sparsectrl_lcm."):
                    continue
                name = module.removeprefix("sparsectrl_lcm.")
                if name and not name.startswith(part.replace("/", ".")):
                    yield path, name


@pytest.mark.parametrize("part", [part for part in ALLOWED if (ROOT / part).is_dir()])
def test_dependencies_point_one_way(part: str) -> None:
    for path, module in imports(part):
        assert module.split(".")[0] in ALLOWED[part], f"{path} imports {module}"


@pytest.mark.parametrize(("part", "exceptions"), [("engine", set(EXCEPTIONS)), ("export", set())])
def test_only_the_format_is_taken_from_the_runtime(part: str, exceptions: set[str]) -> None:
    for path, module in imports(part):
        assert module.startswith(SHARED) or module in exceptions, f"{path} imports {module}"
