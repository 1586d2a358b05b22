"""What the tests of a worker share of bundles that no test changes: their checksums, and the sessions of their graphs.

Verifying a bundle and opening the graphs of a pipeline take longer than a small clip.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsectrl_lcm.runtime.cpu.compiled_cache import CompiledGraph
from sparsectrl_lcm.runtime.format.bundle import demo_bundle

DEMO = demo_bundle()
EXPORTED = Path(__file__).parent.parent / ".cache/tests"


def is_in(path: Path, *folders: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def opened_once(open_session: Callable[..., Any], *folders: Path) -> Callable[..., Any]:
    """Opens a graph once for the same arguments, if it is in one of these folders."""
    known: dict[str, Any] = {}

    def opened(path: Path, *arguments: Any, **named: Any) -> Any:
        if not is_in(path, *folders):
            return open_session(path, *arguments, **named)
        key = f"{path} {path.stat().st_mtime_ns} {[without_cache(value) for value in arguments]} {named}"
        if key not in known:
            known[key] = open_session(path, *arguments, **named)
        return known[key]

    return opened


def without_cache(value: Any) -> Any:
    """OpenVINO's options without those that name a cache, which makes no difference to the session."""
    if isinstance(value, CompiledGraph):
        return None
    return {name: item for name, item in value.items() if "CACHE" not in name} if isinstance(value, dict) else value


def verified_once(first_difference: Callable[..., Any], *folders: Path) -> Callable[..., Any]:
    """Compares the files of these folders with their checksums once; no file differs after that."""
    right: set[tuple[Any, ...]] = set()

    def checked(folder: Path, records: Mapping[str, Any]) -> Any:
        key = (folder, *records)
        if key in right:
            return None
        found = first_difference(folder, records)
        if found is None and is_in(folder, *folders):
            right.add(key)
        return found

    return checked
