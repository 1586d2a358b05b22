"""The files of results, and the command line that benchmarks record in them."""

import shlex
import sys
from datetime import date
from itertools import count
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PLACES = ("--bundle", "--cache", "--checkpoints", "--output")
"""Options with paths of this machine, which are left out of the recorded command line."""


def results_file(name: str, asked: Path | None = None, folder: Path = RESULTS) -> Path:
    """The requested file, or a new one named after today and `name`. Makes its folder."""
    if asked:
        asked.parent.mkdir(parents=True, exist_ok=True)
        return asked
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{date.today().isoformat()}-{name}"
    names = (f"{stem}.json" if number == 1 else f"{stem}-{number}.json" for number in count(1))
    return next(path for path in map(folder.joinpath, names) if not path.exists())


def command(arguments: list[str] | None = None) -> str:
    """The command line to run from the repository's root, without `PLACES`.

    Args:
        arguments: the program and its arguments; by default those of this process.
    """
    program, *words = sys.argv if arguments is None else arguments
    kept, left = ["python", f"benchmarks/{Path(program).name}"], iter(words)
    for word in left:
        if word in PLACES:
            next(left, None)
        elif not word.startswith(tuple(f"{place}=" for place in PLACES)):
            kept.append(word)
    return shlex.join(kept)
