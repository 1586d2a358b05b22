"""How far the frames of each contender are from those of diffusers in fp32, in levels of 255."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cpu_contenders import BASELINE, OURS, RECORDS
from sparsectrl_lcm.benchmarks.harness.rounds import Contender
from sparsectrl_lcm.benchmarks.harness.worker_process import Worker, WorkerFailed


def warm_up_files(names: Sequence[str], folder: Path) -> dict[str, str]:
    """A file for the frames of each contender with the full decoder; its warm-up writes them."""
    return {name: _file(name, folder) for name in names if RECORDS[name].decoder == "full"}


def extra_files(names: Sequence[str], folder: Path) -> dict[str, str]:
    """A file for frames that are drawn in addition, by contender.

    These are the baseline's, if it is not measured, and those of this project's contenders with a tiny decoder, which
    decode once more with the full one. diffusers with a tiny decoder is left out: with the full one its frames are
    those of another contender.
    """
    warmed_up = warm_up_files(names, folder)
    tiny = [name for name in names if name in OURS and name not in warmed_up]
    reference = [BASELINE] if (warmed_up or tiny) and BASELINE not in warmed_up else []
    return {name: _file(name, folder) for name in (*tiny, *reference)}


def _file(name: str, folder: Path) -> str:
    return str(folder / f"{name}.npy")


def draw(item: Contender, request: Mapping[str, Any], path: str) -> None:
    """Makes the frames of a contender with the full decoder in a process of their own; they are not measured."""
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
    """Mean and largest difference from the baseline's frames, by contender; empty if there are no such frames.

    Args:
        files: frames of each contender, uint8 [F, H, W, 3]; files that do not exist are left out.
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
