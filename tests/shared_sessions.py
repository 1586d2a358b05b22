"""Sessions that all tests of a worker share: opening the graphs of a pipeline takes longer than a small clip."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsectrl_lcm.runtime.format.bundle import demo_bundle

DEMO = demo_bundle()
EXPORTED = Path(__file__).parent.parent / ".cache/tests"


def opened_once(open_session: Callable[..., Any], *folders: Path) -> Callable[..., Any]:
    """Opens a graph once for the same arguments, if it is in one of these folders, whose graphs no test changes."""
    known: dict[str, Any] = {}

    def opened(path: Path, *arguments: Any, **named: Any) -> Any:
        if not any(path.is_relative_to(folder) for folder in folders):
            return open_session(path, *arguments, **named)
        key = f"{path} {path.stat().st_mtime_ns} {[without_cache(value) for value in arguments]} {named}"
        if key not in known:
            known[key] = open_session(path, *arguments, **named)
        return known[key]

    return opened


def without_cache(value: Any) -> Any:
    """OpenVINO's options without those that name its cache, which makes no difference to the session."""
    return {name: item for name, item in value.items() if "CACHE" not in name} if isinstance(value, dict) else value
