"""Which commit the measured code is: the other machine may lack git."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "engine", "runtime", "tests")
"""The folders whose code the stages run."""
COMMIT = "commit"


def write_commit(folder: Path, commit: str | None) -> None:
    """Writes the commit of this source tree and the digest of its code."""
    (folder / COMMIT).write_text(f"{commit or ''}\n{source_digest()}\n", encoding="utf-8")


def prepared_commit(folder: Path) -> str | None:
    """The commit that `write_commit` wrote, with `-dirty` if the code is another than then; None if there is none."""
    if not (folder / COMMIT).exists():
        return None
    commit, _, digest = (folder / COMMIT).read_text(encoding="utf-8").removesuffix("\n").partition("\n")
    if not commit or digest == source_digest() or commit.endswith("-dirty"):
        return commit or None
    return f"{commit}-dirty"


def source_digest(root: Path = ROOT) -> str:
    """A digest of the names and contents of all Python files that the stages run."""
    found = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            found.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()
