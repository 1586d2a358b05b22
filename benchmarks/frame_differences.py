"""Differences between the frames of each contender and those of diffusers in fp32, in levels of 255."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cpu_contenders import BASELINE, OURS, RECORDS
from sparsectrl_lcm.benchmarks.harness.rounds import Contender
from sparsectrl_lcm.benchmarks.harness.worker_process import Worker, WorkerFailed


def warm_up_files(names: Sequence[str], folder: Path) -> dict[str, str]:
    """The file of each contender with the full decoder, into which its warm-up writes the frames."""
    return {name: _file(name, folder) for name in names if RECORDS[name].decoder == "full"}


def extra_files(names: Sequence[str], folder: Path) -> dict[str, str]:
    """The files for additional frames, by contender.

    These are frames of the baseline, if it is not measured, and frames that this project's contenders with a tiny
    decoder make with the full one. diffusers with a tiny decoder is left out: with the full decoder its frames equal
    those of another contender.
    """
    warmed_up = warm_up_files(names, folder)
    tiny = [name for name in names if name in OURS and name not in warmed_up]
    reference = [BASELINE] if (warmed_up or tiny) and BASELINE not in warmed_up else []
    return {name: _file(name, folder) for name in (*tiny, *reference)}


def _file(name: str, folder: Path) -> str:
    return str(folder / f"{name}.npy")


def draw(item: Contender, request: Mapping[str, Any], path: str) -> None:
    """Makes the frames of a contender with the full decoder in a separate process, without measuring."""
    worker = Worker(item.command)
    try:
        worker.ask("load", **item.load)
        full = {"decoder": "full"} if "decoder" in item.request else {}
        worker.ask("warm_up", **{**request, **item.request, **full}, save=path)
    except WorkerFailed as error:
        print(f"{item.name}: no frames to compare: {error}", file=sys.stderr)
    finally:
        worker.close()


def levels(files: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Mean and largest difference from the baseline's frames, by contender; empty without frames of the baseline.

    Args:
        files: files with the frames of each contender, uint8 [F, H, W, 3]; missing files are left out.
    """
    if not Path(files.get(BASELINE, "")).is_file():
        return {}
    reference = np.load(files[BASELINE]).astype(int)
    found = {}
    for name, path in files.items():
        if name != BASELINE and Path(path).is_file():
            difference = np.abs(np.load(path) - reference)
            found[name] = {"mean": float(difference.mean()), "max": int(difference.max())}
    return found
