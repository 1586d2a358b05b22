"""Bundles that differ in their weights."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np


def with_other_motion_module(bundle: Path, folder: Path, seed: int = 1) -> Path:
    """Copies a bundle, without engines, and changes the motion-module weights; shapes stay the same."""
    return with_other_weights(bundle, folder, "onnx/unet.motion.weights", seed)


def with_other_weights(bundle: Path, folder: Path, file: str, seed: int = 1) -> Path:
    """Copies a bundle, without engines, and changes the weights in one file; shapes stay the same."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("engines"))
    path = folder / file
    values = np.fromfile(path, np.float32)
    noise = np.random.default_rng(seed).standard_normal(values.size).astype(np.float32)
    (values * (1 + 0.5 * noise)).astype(np.float32).tofile(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
