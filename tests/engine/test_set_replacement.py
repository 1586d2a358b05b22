"""A set of engines takes the place of an earlier one, or leaves it whole."""

from pathlib import Path

import pytest
from fakes.tensorrt_builds import small_copy
from fakes.toy_builds import GRAPHS, Toy, names
from sparsectrl_lcm.engine.engine_writer import replace_folder
from sparsectrl_lcm.engine.unfinished_sets import unfinished_sets
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.format.engine_sets import find_set


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_copy(tmp_path)


STOPS: list[tuple[type[BaseException], int, bool]] = [
    (OSError, 1, False),
    (KeyboardInterrupt, 1, True),
    (OSError, 2, False),
    (KeyboardInterrupt, 2, False),
    (KeyboardInterrupt, 2, True),
]
"""What stops a build, at which of its two last renames, and whether after it."""


def stop_at_a_rename(patch: pytest.MonkeyPatch, error: type[BaseException], place: int, after: bool) -> None:
    renames: list[Path] = []
    rename = Path.rename

    def stopped(path: Path, other: Path) -> Path:
        renames.append(path)
        if len(renames) == place and not after:
            raise error
        result = rename(path, other)
        if len(renames) == place:
            raise error
        return result

    patch.setattr(Path, "rename", stopped)


def test_a_folder_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    source, target = tmp_path / ".set-1-0123abcd", tmp_path / "set"
    for text in ("first", "second"):
        source.mkdir()
        (source / "engine").write_text(text)
        replace_folder(source, target)
        assert [path.name for path in tmp_path.iterdir()] == ["set"]
        assert (target / "engine").read_text() == text


@pytest.mark.parametrize(("error", "place", "after"), STOPS)
def test_a_set_that_cannot_be_replaced_stays(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], place: int, after: bool
) -> None:
    """The set is there and whole after a stop at any moment, and the next build has nothing left to make."""
    Toy(bundle).build()
    newer, replaced = Toy(bundle, "2"), (place, after) == (2, True)
    with monkeypatch.context() as patch, pytest.raises(BackendError if error is OSError else error):
        stop_at_a_rename(patch, error, place, after)
        newer.build()
    engines = find_set(bundle, "openvino", "fp32")
    assert engines is not None
    assert [engines.fault(newer.bundle.manifest, graph) for graph in GRAPHS] == [None] * 4
    assert newer.text("unet") == ("unet 2" if replaced else "unet 1")
    assert len(list(unfinished_sets(bundle, "openvino"))) == (not replaced)
    newer.made.clear()
    newer.build()
    assert newer.made == (GRAPHS if replaced else [])
    assert newer.text("unet") == "unet 2"
    assert names(bundle) == ["fp32"]
