"""Makes the demo bundle of the package from the checkpoints of the small model that was trained for it.

    python demo/make_bundle.py [--trained DIR] [-o BUNDLE]

Needs the `export` extra. The default output is runtime/demo_bundle.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.plan import ExportOptions
from sparsectrl_lcm.runtime.format.manifest import TrainingRecord, read_manifest
from world import FRAMES, KEYFRAMES, SIZE, scene

HERE = Path(__file__).parent
TRAINED, OUTPUT = HERE / "trained", HERE.parent / "runtime" / "demo_bundle"
SCENES = 1000
"""Captions that have all words, many times over."""


def main() -> None:
    """Replaces the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, default=TRAINED, help="the folder of a training")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.output.exists() and not (options.output / "manifest.json").exists():
        parser.error(f"{options.output} exists and is not a bundle; name a new folder")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "demo_bundle"
        export_bundle(
            export_options(options.trained), made, lambda name, index, count: print(f"{index}/{count} {name}")
        )
        record_training(made)
        shutil.rmtree(options.output, ignore_errors=True)
        shutil.copytree(made, options.output)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


def export_options(trained: Path) -> ExportOptions:
    """Returns the options that export the checkpoints of a training."""
    return ExportOptions(
        base=str(trained / "base"),
        motion_adapter=str(trained / "motion_adapter"),
        controlnets={kind: str(trained / kind) for kind in ("scribble", "rgb")},
        tiny_decoder=str(trained / "tiny_decoder"),
        temporal_norm="frame",
    )


def record_training(bundle: Path) -> None:
    """Writes into a bundle's manifest what the model of the demo was trained for."""
    words = {word for seed in range(SCENES) for word in scene(seed).caption.split()}
    count = len(KEYFRAMES)
    record = TrainingRecord(
        height=SIZE,
        width=SIZE,
        frames=FRAMES,
        min_keyframes=count,
        max_keyframes=count,
        words=tuple(sorted(words)),
    )
    read_manifest(bundle).model_copy(update={"trained_for": record}).write(bundle)


if __name__ == "__main__":
    main()
