"""Checkpoints and bundles that the tests share. Exports take minutes, so they are kept in .cache/tests."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Exported:
    """A bundle and the checkpoints it was made of."""

    name: str
    checkpoints: Path
    bundle: Path


def _cache() -> Path:
    sources = sorted(
        [*(ROOT / "export").glob("*.py"), ROOT / "runtime" / "manifest.py", ROOT / "tests/architectures.py"]
    )
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    for package in ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir"):
        digest.update(version(package).encode())
    return ROOT / ".cache" / "tests" / digest.hexdigest()[:16]


def export_architecture(name: str) -> Exported:
    """Exports an architecture of `architectures.py` with diffusers' temporal norm, or takes it from the cache."""
    from architectures import ARCHITECTURES
    from filelock import FileLock
    from sparsectrl_lcm.export.exporter import export_bundle
    from sparsectrl_lcm.export.plan import ExportOptions
    from sparsectrl_lcm.export.random_checkpoints import write_checkpoints

    folder = _cache() / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, bundle = folder / "checkpoints", folder / "bundle"
    with FileLock(folder / "lock"):
        if not bundle.exists():
            parts = write_checkpoints(checkpoints, ARCHITECTURES[name])
            options = ExportOptions(
                base=str(parts["base"]),
                motion_adapter=str(parts["motion_adapter"]),
                controlnets={"scribble": str(parts["scribble"]), "rgb": str(parts["rgb"])},
                tiny_decoder=str(parts["tiny_decoder"]),
                temporal_norm="clip",
            )
            export_bundle(options, bundle)
    return Exported(name, checkpoints, bundle)


@pytest.fixture(scope="session", params=["sd15_like", "other"])
def exported(request: pytest.FixtureRequest) -> Exported:
    return export_architecture(request.param)


@pytest.fixture(scope="session")
def sd15_like() -> Exported:
    return export_architecture("sd15_like")


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered from test to test in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
    yield
