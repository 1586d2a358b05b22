"""Checkpoints and bundles shared by the tests. Exports take minutes, so they are cached in .cache/tests.

Tests run with one exported architecture and with the demo bundle; with --slow, with a second architecture too.
"""

import gc
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from bytecode import write_bytecode
from scheduling import collects_all, imports_much

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".cache/tests/matplotlib"))  # its list of fonts, for all tests
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers fill the cores; more torch threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    STARTUP = str(ROOT / "tests/startup")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [STARTUP, os.environ.get("PYTHONPATH")]))
    sys.path.append(STARTUP)
    from one_thread import compute_with_one_thread

    compute_with_one_thread()


@dataclass(frozen=True)
class Exported:
    """A bundle and the checkpoints it was exported from."""

    name: str
    checkpoints: Path
    bundle: Path


FIRST = "runtime/test_pipeline.py"
"""The file whose tests with the exported architecture export it for all workers."""
LONG = (
    "service/local_runner",
    "engine/test_tensorrt_rtx.py",
    "service/page",
    "service",
    "torch_engines",
    "export",
    "benchmarks",
    "engine/test_verify.py",
    "engine/test_openvino_engines.py",
    "runtime/test_openvino.py",
    "engine/test_onnxruntime_cuda.py",
    "docs/test_blocks.py",
    "demo",
    "runtime/test_portability.py",
    "cli/test_bench.py",
)
"""Files and folders that start first, so that no long file runs alone at the end."""
TOO_LONG = (
    "engine/test_tensorrt_rtx.py",
    "engine/test_openvino_engines.py",
    "engine/test_onnxruntime_cuda.py",
    "cli/test_bench.py",
    "test_after_a_fault_at_any_call_the_pipeline_recovers",
    "test_clips_engines_and_reports_are_made_as_on_windows",
    "test_frames_of_fp16_are_within_three_levels",
)
"""Files and tests that take longer than `--fast` allows."""
_fast = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also tests that take minutes")
    parser.addoption("--fast", action="store_true", help="only tests without torch, exported bundles and long builds")


def pytest_configure(config: pytest.Config) -> None:
    global _fast  # noqa: PLW0603
    _fast = config.getoption("--fast")
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        write_bytecode(ROOT, config)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    if config.getoption("--fast"):
        return True if collection_path.as_posix().endswith(TOO_LONG) or imports_much(collection_path) else None
    worker = getattr(config, "workerinput", None)
    if worker is None or collects_all(worker["workerid"], worker["workercount"]):
        return None
    return True if imports_much(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _freeze(item.path)


@lru_cache(1)
def _freeze(_: Path) -> None:
    """Takes what lives when a file begins for lasting, such as modules. Collections of garbage would walk through it.

    Builds of engines collect garbage after every graph.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
    if config.getoption("--fast"):
        items[:] = [
            item
            for item in items
            if not _needs(item, "exported", "sd15_like", "checkpoints") and not item.name.startswith(TOO_LONG)
        ]
    waiting = {_scope(item) for item in items if _needs(item, "exported", "sd15_like")}
    items.sort(key=lambda item: _start(item, waiting))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from scheduling import Scheduling

    return Scheduling(config, log)


def _needs(item: pytest.Item, *fixtures: str) -> bool:
    return not set(fixtures).isdisjoint(getattr(item, "fixturenames", ()))


def _scope(item: pytest.Item) -> tuple[str, bool]:
    """Returns what a worker runs in one go: a file, or its tests with the exported architecture."""
    return _path(item), "sd15_like" in item.name


def _start(item: pytest.Item, waiting: set[tuple[str, bool]]) -> tuple[int, int]:
    """Returns the position of a test in the start order: the export, long files, those in need of it, the others."""
    path = _path(item)
    place = next((place for place, prefix in enumerate(LONG) if path.startswith(prefix)), len(LONG))
    if _scope(item) == (FIRST, True):
        return 0, 0
    if _scope(item) in waiting:
        return 2, place
    return (1 if place < len(LONG) else 3), place


def _path(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").as_posix()


def _cache() -> Path:
    sources = sorted(
        [*(ROOT / "export").glob("*.py"), ROOT / "runtime/format/manifest.py", ROOT / "tests/architectures.py"]
    )
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    for package in ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir"):
        digest.update(version(package).encode())
    return ROOT / ".cache" / "tests" / digest.hexdigest()[:16]


def export_architecture(name: str) -> Exported:
    """Exports an architecture of `architectures.py` with diffusers' temporal norm, or takes it from the cache."""
    if _fast:
        pytest.skip("needs an exported bundle")
    from filelock import FileLock

    (_cache() / name).mkdir(parents=True, exist_ok=True)
    with FileLock(_cache() / name / "lock").acquire(poll_interval=1):  # another worker may export for minutes
        return _export(name)


def _export(name: str) -> Exported:
    folder = _cache() / name
    exported = Exported(name, folder / "checkpoints", folder / "bundle")
    if exported.bundle.exists():
        return exported
    from architectures import ARCHITECTURES  # loads torch, which most workers do without
    from sparsectrl_lcm.benchmarks.random_checkpoints import write_checkpoints
    from sparsectrl_lcm.export.exporter import export_bundle
    from sparsectrl_lcm.export.plan import ExportOptions

    parts = write_checkpoints(exported.checkpoints, ARCHITECTURES[name])
    options = ExportOptions(
        base=str(parts["base"]),
        motion_adapter=str(parts["motion_adapter"]),
        controlnets={"scribble": str(parts["scribble"]), "rgb": str(parts["rgb"])},
        tiny_decoder=str(parts["tiny_decoder"]),
        temporal_norm="clip",
    )
    export_bundle(options, exported.bundle)
    return exported


@pytest.fixture(scope="session", params=["sd15_like", pytest.param("other", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> Exported:
    return export_architecture(request.param)


@pytest.fixture(scope="session")
def sd15_like() -> Exported:
    return export_architecture("sd15_like")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a motion adapter with random weights."""
    from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture, write_base, write_motion_adapter

    folder = tmp_path_factory.mktemp("checkpoints")
    write_base(folder / "base", Architecture(), seed=0)
    write_motion_adapter(folder / "motion_adapter", Architecture(), seed=1)
    return folder


def share_compiled_graphs(cache: Path) -> None:
    """Puts the compiled graphs of all test runs into a user cache folder. Their names depend on all that they do."""
    compiled = ROOT / ".cache/tests/openvino"
    compiled.mkdir(parents=True, exist_ok=True)
    (cache / "sparsectrl-lcm").mkdir(parents=True)
    with suppress(OSError):  # Windows wants rights for a link
        (cache / "sparsectrl-lcm/openvino").symlink_to(compiled)


@pytest.fixture(scope="session")
def _cache_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("user-caches")  # once: it walks through all that was made before
    return (folder / str(number) for number in count())


@pytest.fixture(autouse=True)
def _cache_folder(_cache_folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each test a user cache folder of its own. In it are only the graphs that OpenVINO has compiled so far."""
    cache = next(_cache_folders)
    share_compiled_graphs(cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="session", autouse=True)
def _lasting_bundles() -> Iterator[None]:
    """Bundles that no test changes are verified once, and the sessions of their graphs are shared."""
    from lasting_bundles import DEMO, EXPORTED, opened_once, verified_once
    from sparsectrl_lcm.runtime.cpu import onnxruntime, openvino
    from sparsectrl_lcm.runtime.format import bundle, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "OnnxRuntimeSession", opened_once(onnxruntime.OnnxRuntimeSession, DEMO, EXPORTED))
        patch.setattr(openvino, "OpenVinoSession", opened_once(openvino.OpenVinoSession, DEMO))
        for module in (bundle, weights):
            patch.setattr(module, "first_difference", verified_once(bundle.first_difference, DEMO, EXPORTED))
        yield


@pytest.fixture
def raising() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, whatever started the tests: background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
