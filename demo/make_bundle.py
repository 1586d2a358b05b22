"""Makes the demo bundle that ships in the package: the real architecture at small size.

    python demo/make_bundle.py                             # random weights, fixed seed
    python demo/make_bundle.py --trained DIR -o BUNDLE     # the weights of demo/train.py

Needs the `export` extra. Without `-o` the result lies in runtime/demo_bundle.
"""

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.plan import ExportOptions
from sparsectrl_lcm.export.random_checkpoints import Architecture, write_checkpoints

ARCHITECTURE = Architecture(
    channels=(16, 32, 32, 32), groups=8, text_width=32, vae_channels=(16, 16, 16, 16), sample_size=16
)  # 128x128 pixels
SEED = 2026
OUTPUT = Path(__file__).parent.parent / "runtime" / "demo_bundle"
TRAINED = ("base", "motion_adapter", "scribble", "rgb", "tiny_decoder")
"""Folders of a training."""


def main() -> None:
    """Replaces the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.trained is None:
            parts = write_checkpoints(Path(folder), ARCHITECTURE, SEED)
            del parts["tiny_decoder"]
        else:
            parts = {name: options.trained / name for name in TRAINED}
        made = Path(folder) / "demo_bundle"
        export_bundle(export_options(parts), made, lambda name, index, count: print(f"{name} ({index + 1}/{count})"))
        shutil.rmtree(options.output, ignore_errors=True)
        shutil.copytree(made, options.output)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


def export_options(parts: Mapping[str, Path]) -> ExportOptions:
    """How checkpoints become the bundle."""
    return ExportOptions(
        base=str(parts["base"]),
        motion_adapter=str(parts["motion_adapter"]),
        controlnets={kind: str(parts[kind]) for kind in ("scribble", "rgb")},
        tiny_decoder=str(parts["tiny_decoder"]) if "tiny_decoder" in parts else None,
        temporal_norm="frame",
    )


if __name__ == "__main__":
    main()
