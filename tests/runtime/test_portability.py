"""Everything except the service runs on Windows and macOS."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import windows_emulation
from fakes.windows_emulation import POSIX_ATTRIBUTES, POSIX_MODULES
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import demo_bundle

ROOT = Path(__file__).parent.parent.parent
GUARD = ROOT / "runtime" / "operating_system.py"
OF_THE_SERVICE = {ROOT / "cli" / name for name in ("serve.py", "keys.py", "service.py")}
REQUEST = {"prompt": "a red circle moves right", "seed": 7, "num_inference_steps": 2, "num_frames": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="the emulation reads /proc")
def test_clips_engines_and_reports_are_made_as_on_windows(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle, clip = tmp_path / "bundle", tmp_path / "\N{CYRILLIC SMALL LETTER KA}.webm"
    shutil.copytree(demo_bundle(), bundle, ignore=shutil.ignore_patterns("engines"))
    generate = ["generate", "--bundle", str(bundle), "--prompt", str(REQUEST["prompt"]), "--seed", "7", "--steps", "2"]
    generate += ["--frames", "2", "-o", str(clip)]
    build = ["build", str(bundle), "--no-check"]
    commands = [
        [*generate, "--backend", "onnxruntime"],
        [*build, "--backend", "onnxruntime"],
        [*generate, "--backend", "onnxruntime"],
        [*build, "--backend", "onnxruntime"],  # replaces the first
        [*build[:-1], "--backend", "openvino", "--precision", "fp32", "--graph", "vae_decoder_tiny"],  # with its check
        [*build, "--backend", "openvino", "--precision", "fp32"],
        ["inspect", str(bundle)],
        ["doctor"],
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, windows_emulation.__file__, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, encoding="cp1252", check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr

    in_use = [line for line in done.stderr.splitlines() if line.startswith("in use: ")]
    assert all(line.endswith(".lock") for line in in_use), in_use  # a lock file is removed once it is released
    assert "\\u043a.webm: 2 frames" in done.stdout
    assert "vae_decoder_tiny" in done.stdout.partition("> inspect")[2]
    assert "GPU: no NVIDIA driver was found" in done.stdout.partition("> doctor")[2]
    expected = VideoPipeline.load(bundle, "onnxruntime").generate(**REQUEST)
    assert clip.read_bytes() == expected.save(tmp_path / "expected.webm").read_bytes()
    for backend in ("onnxruntime", "openvino"):
        assert [path.name for path in (bundle / "engines" / backend).iterdir()] == ["fp32"]


def posix_uses(path: Path) -> Iterator[str]:
    """The POSIX-only modules and attributes that a file uses."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in POSIX_MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.partition(".")[0] in POSIX_MODULES:
                yield module
            hidden = POSIX_ATTRIBUTES.get(module, frozenset())
            yield from (f"{module}.{alias.name}" for alias in node.names if alias.name in hidden)
        elif isinstance(node, ast.Attribute) and isinstance(module := node.value, ast.Name):
            yield from (f"{module.id}.{node.attr}" for _ in {node.attr} & POSIX_ATTRIBUTES.get(module.id, frozenset()))


def test_only_one_module_names_what_posix_alone_has() -> None:
    parts = ("cli", "engine", "export", "runtime", "sparsectrl_lcm")
    files = {path for part in parts for path in (ROOT / part).rglob("*.py")} - OF_THE_SERVICE
    found = {str(path.relative_to(ROOT)): uses for path in files if (uses := sorted(set(posix_uses(path))))}
    assert list(found) == [str(GUARD.relative_to(ROOT))]
    assert {"resource", "os.sched_getaffinity", "os.sysconf", "mmap.MADV_DONTNEED"} <= set(*found.values())


def test_every_text_file_is_read_and_written_in_utf_8() -> None:
    parts = ("cli", "demo", "engine", "export", "runtime", "sparsectrl_lcm")
    calls = [
        (str(path.relative_to(ROOT)), node.lineno)
        for part in parts
        for path in (ROOT / part).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("read_text", "write_text")
        if not any(item.arg == "encoding" for item in node.keywords)
        and not any(isinstance(item, ast.Constant) and item.value == "utf-8" for item in node.args)
    ]
    assert calls == []
