"""Wheel and sdist: complete, accepted by the checks of an upload, and usable once installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.missing_programs import missing

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_PACKAGED = {".ci", "demo", "deploy", "docs", "tests"}
"""Folders at the top that are no packages; of `benchmarks` only `harness` is one."""


def tracked() -> list[Path]:
    """The files of the repository."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def folder_of(package: str) -> Path:
    """Where a package lies in the repository."""
    parts, places = package.split("."), SETUPTOOLS["package-dir"]
    known = next(".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in places)
    return ROOT / places[known] / Path(*package.removeprefix(known).strip(".").split("."))


def test_every_module_and_data_file_is_in_a_package() -> None:
    packaged = {path for package in SETUPTOOLS["packages"] for path in folder_of(package).glob("*.py")}
    for package, patterns in SETUPTOOLS["package-data"].items():
        packaged |= {path for pattern in patterns for path in folder_of(package).glob(pattern)}
    wanted = {
        ROOT / path
        for path in tracked()
        if len(path.parts) > 1
        and path.parts[0] not in NOT_PACKAGED
        and (path.parts[0] != "benchmarks" or path.parts[1] == "harness")
    }
    assert wanted - packaged == set()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the tracked files, and the wheel that was built from it."""
    for tool in ("build", "twine", "check_wheel_contents"):
        if find_spec(tool) is None:
            missing(tool)
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked():
        if path.parts[0] not in NOT_PACKAGED:
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
    python("-m", "build", "--no-isolation", "--outdir", dist, source)
    return dist


def python(*words: object, **options: Any) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_index_would_take_both(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    python("-m", "twine", "check", "--strict", wheel, sdist)
    python("-m", "check_wheel_contents", wheel)


@pytest.mark.slow
def test_a_clip_and_a_server_from_the_wheel(built: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (wheel,) = built.glob("*.whl")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    elsewhere = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(site)}}
    place = python("-c", "import sparsectrl_lcm; print(sparsectrl_lcm.__file__)", **elsewhere)
    assert place.strip() == str(site / "sparsectrl_lcm/__init__.py")
    program = site / "bin/sparsectrl-lcm"
    clip = ("--prompt", "a star", "--steps", 1, "--backend", "onnxruntime", "-o", "a.mp4")
    python(program, "generate", *clip, **elsewhere)
    assert (tmp_path / "a.mp4").stat().st_size > 1000

    port = free_port()
    command = [sys.executable, "-u", program, "serve", "--data", "data", "--port", port, "--anonymous"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **elsewhere) as server:
        try:
            url = f"http://127.0.0.1:{port}/"
            assert server.stdout.readline() == f"{url}\n"
            assert "/page/main.js" in httpx.get(url, timeout=30).text
            assert httpx.get(f"{url}page/main.js").status_code == 200
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)
    assert server.returncode == 0


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])
