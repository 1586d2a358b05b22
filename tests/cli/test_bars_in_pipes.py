"""Progress bars are for terminals: a pipe or a log gets none."""

from types import SimpleNamespace
from typing import Any

import pytest
from sparsectrl_lcm.cli.clips_bar import ClipsBar
from sparsectrl_lcm.cli.progress_bar import Bar


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_shows_bars(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    job: Any = SimpleNamespace(id="1")
    with Bar() as bar:
        bar.update("decode 4/4", 1.0)
    with ClipsBar(2) as clips:
        clips.on_end(job)
    assert bool(capsys.readouterr().err) is terminal
