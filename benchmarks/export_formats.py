"""Exports the same weights from folders in diffusers format and from their authors' single files: time and memory.

    python benchmarks/export_formats.py --architecture full

Writes random weights in both formats to --cache, if they are missing: a base, motion modules and a SparseCtrl for
scribbles, 8 GB each at full size. Exports each format in a process of its own, one after the other, and turns the order
with each of `--rounds`. The bundles must have the same weights, bit for bit. Prints a table and writes it as JSON into
benchmarks/results/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import reports
from models import ARCHITECTURES, peak_gb
from sparsectrl_lcm.benchmarks.harness.worker_process import stop_with_children
from sparsectrl_lcm.runtime.machine import report_head

FORMATS = ("folders", "files")
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "onnx-ir", "onnxruntime", "sparsectrl-lcm")


def write_models(cache: Path, architecture: str) -> None:
    """Writes both formats if they are missing."""
    if (cache / "done").exists():
        return
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import torch
    from original_layouts import animatediff, ldm_text, ldm_unet, ldm_vae
    from safetensors.torch import load_file, save_file
    from sparsectrl_lcm.benchmarks import random_checkpoints as random

    small = random.Architecture(channels=(32, 64), heads=8, motion_heads=8, groups=32)  # what files do not tell
    arch = random.FULL_SIZE if architecture == "full" else small
    folders, files = cache / "folders", cache / "files"
    random.write_base(folders / "base", arch, 0)
    random.write_motion_adapter(folders / "motion_adapter", arch, 10)
    random.write_controlnet(folders / "scribble", arch, "scribble", 20)
    files.mkdir(exist_ok=True)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}

    base = ldm_unet(weights(folders / "base/unet"), arch.layers)
    base |= ldm_vae(weights(folders / "base/vae"), len(arch.vae_channels))
    base |= ldm_text(weights(folders / "base/text_encoder"))
    save_file({name: value.contiguous() for name, value in base.items()}, files / "model.safetensors")
    motion = animatediff(weights(folders / "motion_adapter"), "module.")
    torch.save({"epoch": 1, "global_step": 2, "state_dict": motion}, files / "v3_sd15_mm.ckpt")
    config = {"set_noisy_sample_input_to_zero": True, "conditioning_channels": 3}
    control = {**animatediff(weights(folders / "scribble")), "animatediff_config": config}
    torch.save({"controlnet": control}, files / "v3_sd15_sparsectrl_scribble.ckpt")
    (cache / "done").touch()


def export(cache: Path, kind: str) -> dict[str, Any]:
    """Exports one format. Returns seconds, memory, and the checksums of the weights."""
    from sparsectrl_lcm.export.exporter import export_bundle
    from sparsectrl_lcm.export.plan import ExportOptions

    root, folders = cache / kind, cache / "folders"
    names = {
        "folders": ("base", "motion_adapter", "scribble"),
        "files": ("model.safetensors", "v3_sd15_mm.ckpt", "v3_sd15_sparsectrl_scribble.ckpt"),
    }
    base, motion, control = (str(root / name) for name in names[kind])
    options = ExportOptions(base, motion, {"scribble": control}, base_config=str(folders / "base"))
    stages: dict[str, float] = {}
    start, last = time.perf_counter(), "loading"

    def on_graph(name: str, index: int, count: int) -> None:
        nonlocal last
        stages[last] = time.perf_counter() - start - sum(stages.values())
        last = name
        print(f"{kind}: {name} ({index + 1}/{count}), peak {peak_gb():.2f} GB so far", file=sys.stderr)

    manifest = export_bundle(options, cache / "bundle", on_graph)
    spent = os.times()
    return {
        "seconds": time.perf_counter() - start,
        "user_seconds": spent.user,
        "system_seconds": spent.system,
        "peak_gb": peak_gb(),
        "stages": stages,
        "weights": {name: file.sha256 for name, file in manifest.files.items() if name.endswith(".weights")},
    }


def run(cache: Path, kind: str) -> dict[str, Any]:
    """Exports one format in a process of its own, and removes the bundle."""
    shutil.rmtree(cache / "bundle", ignore_errors=True)
    command = [sys.executable, __file__, "--child", kind, "--cache", str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate()
        finally:
            stop_with_children(process)
    shutil.rmtree(cache / "bundle", ignore_errors=True)
    if process.returncode:
        sys.exit(f"the export of {kind} failed")
    return dict(json.loads(output))


def main() -> None:
    """Exports both formats, prints the table, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="full")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(".cache/export-formats"))
    parser.add_argument("--output", "-o", type=Path, help="the JSON file; a new one in benchmarks/results/ by default")
    parser.add_argument("--child", choices=("write", *FORMATS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "write":
        write_models(options.cache, options.architecture)
        return
    if options.child:
        print(json.dumps(export(options.cache, options.child)))
        return
    writing = ["--child", "write", "--cache", str(options.cache), "--architecture", options.architecture]
    subprocess.run([sys.executable, __file__, *writing], check=True)
    orders = (FORMATS[:: -1 if number % 2 else 1] for number in range(options.rounds))
    rounds = [{kind: run(options.cache, kind) for kind in order} for order in orders]
    weights = [found.pop("weights") for row in rounds for found in row.values()]
    if any(each != weights[0] for each in weights):
        sys.exit("the formats give different weights")
    print("| format | seconds | user | system | loading | peak GB |")
    print("|---" * 6 + "|")
    for row in rounds:
        for kind, found in row.items():
            columns = [found["seconds"], found["user_seconds"], found["system_seconds"], found["stages"]["loading"]]
            print(f"| {kind} | " + " | ".join(f"{value:.1f}" for value in columns) + f" | {found['peak_gb']:.2f} |")
    path = reports.results_file("export-formats", options.output)
    head = report_head(reports.command(), PACKAGES)
    path.write_text(json.dumps(head | {"architecture": options.architecture, "rounds": rounds}, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
