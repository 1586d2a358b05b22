"""What a clip leaves behind that could not be written."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sparsectrl_lcm.runtime import Clip, OutputError
from sparsectrl_lcm.runtime.output import video


@pytest.mark.parametrize("name", ["new/folder/clip.mp4", "new/clip.png", "frames"])
def test_a_failure_leaves_no_new_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(video, "encode", full)
    with pytest.raises(OutputError, match="No space left on device"):
        Clip(np.zeros((2, 64, 64, 3), np.uint8), seed=1, timings={}).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
