"""Makes the demo bundle that ships in the package: the real architecture at small size, random weights, fixed seed.

    python demo/make_bundle.py

Needs the `export` extra. The result lies in runtime/demo_bundle.
"""

import shutil
import tempfile
from pathlib import Path

from sparsectrl_lcm.export.exporter import export_bundle
from sparsectrl_lcm.export.plan import ExportOptions
from sparsectrl_lcm.export.random_checkpoints import Architecture, write_checkpoints

ARCHITECTURE = Architecture(
    channels=(16, 32, 32, 32), groups=8, text_width=32, vae_channels=(16, 16, 16, 16), sample_size=16
)  # 128x128 pixels
SEED = 2026


def main() -> None:
    """Replaces runtime/demo_bundle."""
    output = Path(__file__).parent.parent / "runtime" / "demo_bundle"
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: str(path) for name, path in write_checkpoints(Path(folder), ARCHITECTURE, SEED).items()}
        options = ExportOptions(
            base=parts["base"],
            motion_adapter=parts["motion_adapter"],
            controlnets={"scribble": parts["scribble"], "rgb": parts["rgb"]},
            temporal_norm="frame",
        )
        made = Path(folder) / "demo_bundle"
        export_bundle(options, made, lambda name, index, count: print(f"{name} ({index + 1}/{count})"))
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(made, output)
    print(f"{output}: {sum(file.stat().st_size for file in output.rglob('*') if file.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
