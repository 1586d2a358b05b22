"""Prepares what lease.py needs on the machine with the GPU, in .cache/lease: packages and graphs.

    python benchmarks/lease_prepare.py                                  both
    python benchmarks/lease_prepare.py --only packages NAME...          these packages alone
    python benchmarks/lease_prepare.py --only graphs --bundle DIR       the graphs of a bundle that exists
    python benchmarks/lease_prepare.py --only commit                    right before the run, if the code has changed

Packages go into one archive, which lease.py unpacks and adds to Python's search path. They are chosen for Linux on
x86-64 and the Python of the other machine, so that this machine may differ. By default they are those that a machine
with torch, transformers and onnxruntime lacks. The graphs are those of the full-size bundle without weights, 1.8 MB;
without --bundle, models.py makes the bundle first (20 GB of disk, minutes). Each call writes the commit and a digest of
the code, since the other machine may lack git; results from other code are marked `-dirty`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lease import ARCHIVE, PREPARED, ROOT
from lease_stages.lines import Unusable, errors_in_a_line
from lease_stages.sources import write_commit

sys.path.insert(0, str(ROOT))

from sparsectrl_lcm.runtime.errors import BundleError
from sparsectrl_lcm.runtime.machine import commit

PACKAGES = (
    "annotated-types",
    "diffusers",
    "platformdirs",
    "polygraphy",
    "pydantic",
    "typing-extensions",
    "typing-inspection",
)
"""With pydantic-core, in the version that pydantic wants."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help="default: what a machine with torch and transformers lacks")
    parser.add_argument("--only", choices=("packages", "graphs", "commit"), help="default: both")
    parser.add_argument("--output", type=Path, default=PREPARED, help="default: .cache/lease")
    parser.add_argument("--python-version", default="3.12", help="of the other machine; default: 3.12")
    parser.add_argument("--bundle", type=Path, help="a full-size bundle; default: make one in --cache")
    parser.add_argument("--cache", type=Path, default=Path(".cache/full-size"), help="folder of models.py")
    return parser.parse_args()


def main() -> None:
    """Prepares what is asked for."""
    options = arguments()
    with errors_in_a_line():
        options.output.mkdir(parents=True, exist_ok=True)
        write_commit(options.output, commit())
        if options.only in (None, "packages"):
            collect(options.packages, options.output / ARCHIVE.format(options.python_version), options.python_version)
        if options.only in (None, "graphs"):
            make_graphs(options.bundle, options.cache, options.output / "graphs")


def collect(packages: list[str], target: Path, python_version: str) -> None:
    """Writes an archive of packages, without those that they depend on."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    platform = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}"]
    platform += [f"--platform={name}" for name in PLATFORMS]
    names = [*packages] or [*PACKAGES, pydantic_core(install, platform)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*install, *platform, "--no-deps", f"--target={folder}", *names], check=True)
        shutil.make_archive(str(target.parent / target.stem), "zip", folder)
    print(f"{target}: {len(names)} packages, {target.stat().st_size / 1e6:.1f} MB")


def pydantic_core(install: list[str], platform: list[str]) -> str:
    """The release of pydantic-core that the newest pydantic wants."""
    report = [*install, "--dry-run", "--ignore-installed", "--report=-", "--target=unused", *platform, "pydantic"]
    found = json.loads(subprocess.run(report, check=True, capture_output=True).stdout)
    names = {item["metadata"]["name"].replace("_", "-"): item["metadata"]["version"] for item in found["install"]}
    return f"pydantic-core=={names['pydantic-core']}"


def make_graphs(bundle: Path | None, cache: Path, target: Path) -> None:
    """Copies the graphs of the full-size bundle. Earlier graphs are replaced once the new ones are complete.

    Raises:
        Unusable: the bundle cannot be read, or `target` holds something else than graphs.
    """
    from lease_bundle import holds_graphs_alone, strip
    from models import prepare

    if target.exists() and not holds_graphs_alone(target):
        raise Unusable(f"{target}: is no folder of graphs; remove it or name another folder with --output")
    if bundle is None:
        prepare(cache)
        bundle = cache / "bundle"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        new = Path(folder) / "graphs"
        try:
            strip(bundle, new)
        except BundleError as error:
            raise Unusable(str(error)) from None
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    megabytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
    print(f"{target}: {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
