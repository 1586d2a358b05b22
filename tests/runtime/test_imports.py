"""Allowed imports between parts, and packages that the runtime must not import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ALLOWED = {
    "sparsectrl_lcm": {"runtime", "cli", "diffusers_arguments"},
    "runtime": set(),
    "engine": {"runtime"},
    "export": {"runtime"},
    "service": {"runtime"},
    "batch": {"runtime", "service"},
    "benchmarks/harness": {"runtime"},
    "cli": {"runtime", "batch", "engine", "export", "service", "benchmarks"},
}
SHARED = ("runtime.format", "runtime.errors")
"""Modules of the runtime that `engine` and `export` may import."""
EXCEPTIONS = {
    "runtime.gpu.device": "an engine's key names the GPU",
    "runtime.gpu.tensorrt_library": "the same library builds and loads engines",
    "runtime.cpu.openvino": "a build compares an engine as OpenVINO will run it",
    "runtime.cpu.integer_products": "the processor decides which images are computed at once",
    "runtime.cpu.sessions": "calibration and emulation follow its interface",
    "runtime.cpu.onnxruntime": "calibration runs on any machine",
    "runtime.backends": "the registry names precisions and builders",
    "runtime.backend_interface": "verify runs requests and single graphs",
    "runtime.example_requests": "int8 is calibrated on them",
    "runtime.load_options": "verify opens engines as requests do",
    "runtime.gpu.engine_scope": "the version and device of an engine are part of its key",
}
"""Further modules that `engine` imports, and why."""


HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "pydantic", "av", "PIL"}


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import sparsectrl_lcm", HEAVY | {"numpy", "sparsectrl_lcm.runtime"}),
        ("from sparsectrl_lcm import Keyframe, VideoPipeline", HEAVY),
        ("import sparsectrl_lcm.runtime", HEAVY),
        ("import sparsectrl_lcm.diffusers", HEAVY),
        ("import sparsectrl_lcm.runtime.backends", HEAVY - {"pydantic"}),
    ],
)
def test_imports_are_lean(code: str, without: set[str]) -> None:
    code = f"import sys; {code}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert without & set(result.stdout.split()) == set()


def test_the_root_package_has_a_version_and_no_other_names() -> None:
    import sparsectrl_lcm

    assert sparsectrl_lcm.__version__ == version("sparsectrl-lcm")
    assert {"Keyframe", "VideoPipeline", "__version__"} <= set(dir(sparsectrl_lcm))
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        sparsectrl_lcm.Pipeline  # noqa: B018


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "sparsectrl_lcm", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"sparsectrl-lcm {version('sparsectrl-lcm')}\n"


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
    """Every module of another part that a part imports, in the form runtime.format.bundle."""
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


def test_the_loop_knows_no_backend() -> None:
    """Schedule, noise, tokenizer and conditioning are functions over arrays."""
    for path, module in imports("runtime/loop"):
        assert not module.startswith(("runtime.cpu", "runtime.gpu", "runtime.backends")), f"{path} imports {module}"


@pytest.mark.parametrize(("part", "exceptions"), [("engine", set(EXCEPTIONS)), ("export", set())])
def test_only_the_format_is_taken_from_the_runtime(part: str, exceptions: set[str]) -> None:
    for path, module in imports(part):
        assert module.startswith(SHARED) or module in exceptions, f"{path} imports {module}"


def test_a_batch_takes_only_the_fields_and_the_cluster_of_the_service() -> None:
    """It runs without the service's packages, and on Windows."""
    taken = {module for _, module in imports("batch") if module.startswith("service")}
    fields = {"service.protocol.clip_input", "service.protocol.advanced_options"}
    assert taken == fields | {"service.runner.bundle_cache", "service.runner.ray_cluster"}
    code = "import sys; from sparsectrl_lcm.batch import ray_pipelines, run; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"sqlalchemy", "fastapi", "httpx", "cryptography", "ray"} & set(result.stdout.split()) == set()


def test_a_server_imports_ray_only_if_it_is_asked_for() -> None:
    code = "import sys; from sparsectrl_lcm.service import server; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ray" not in result.stdout.split()
