"""Clips that are written while they are made."""

import threading
from pathlib import Path

import numpy as np
import pytest
from gradient_clips import gradient_clip
from sparsectrl_lcm.runtime import Cancelled, Clip, InvalidRequest, OutputError
from sparsectrl_lcm.runtime.output import recording as recording_module
from sparsectrl_lcm.runtime.output import video
from sparsectrl_lcm.runtime.output.recording import Recording


@pytest.fixture
def clip() -> Clip:
    return gradient_clip()


def record(clip: Clip, recording: Recording, parts: tuple[int, ...]) -> None:
    """Adds the first frames of a clip in parts of these lengths."""
    start = 0
    for count in parts:
        recording.add(start, clip.frames[start : start + count])
        start += count


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
@pytest.mark.parametrize("parts", [(16,), (1,) * 16, (5, 2), ()])
def test_a_recording_has_the_bytes_of_a_saved_clip(
    clip: Clip, tmp_path: Path, name: str, parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one part, frame by frame with more parts than may wait, and with the rest or all frames left to `save`."""
    monkeypatch.setattr(recording_module, "MAX_WAITING", 2)
    # at widths that are not a multiple of 128, x264 reads uninitialised memory, so that files may differ
    clip = Clip(np.pad(clip.frames, ((0, 0), (0, 0), (0, 32), (0, 0)), "wrap"), 1, {})
    expected = clip.save(tmp_path / "plain" / name, fps=12.5).read_bytes()
    with Recording(tmp_path / "new" / name, fps=12.5) as recording:
        record(clip, recording, parts)
        assert not (tmp_path / "new" / name).exists()
        path = recording.save(clip)
    assert path.read_bytes() == expected
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_vp9_without_lag_is_vp9_with_it(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The purpose of the option: the encoder takes frames at once, and the file is the same."""
    frames = np.concatenate([clip.frames, clip.frames[::-1, ::-1]])  # a cut, and more frames than the lag
    clip = Clip(frames, 1, {})
    without = clip.save(tmp_path / "without.webm").read_bytes()
    monkeypatch.setitem(video.CODECS[".webm"].options, "lag-in-frames", "25")
    assert clip.save(tmp_path / "with.webm").read_bytes() == without


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "sheet.png", "frames"])
def test_a_recording_of_what_needs_all_frames(clip: Clip, tmp_path: Path, name: str) -> None:
    with Recording(tmp_path / name) as recording:
        record(clip, recording, (8, 8))
        assert list(tmp_path.iterdir()) == []
        path = recording.save(clip)
    plain = clip.save(tmp_path / "plain" / name)
    files = [(path, plain)] if path.is_file() else [(file, plain / file.name) for file in sorted(path.iterdir())]
    assert all(file.read_bytes() == other.read_bytes() for file, other in files)
    assert path.is_file() or len(files) == 16


@pytest.mark.parametrize("error", [Cancelled("", "x"), KeyboardInterrupt(), None])
@pytest.mark.parametrize("path", ["clip.mp4", "clip.webm", "new/folder/clip.mp4", "clip.gif"])
def test_a_recording_that_is_not_saved_leaves_nothing(
    clip: Clip, tmp_path: Path, path: str, error: BaseException | None
) -> None:
    before = set(threading.enumerate())
    try:
        with Recording(tmp_path / path) as recording:
            record(clip, recording, (8, 8))
            if error is not None:
                raise error
    except (Cancelled, KeyboardInterrupt) as raised:
        assert raised is error
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= before


def test_a_recording_that_is_stopped_while_it_is_saved_leaves_nothing(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the last frame, while the encoder writes its delayed frames."""
    encode, go_on = video.encode, threading.Event()

    def slow(*arguments: object) -> None:
        encode(*arguments)
        go_on.wait(10)

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        threading.Timer(0.05, go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "encode", slow)
    with pytest.raises(KeyboardInterrupt), Recording(tmp_path / "clip.mp4") as recording:
        record(clip, recording, (16,))
        monkeypatch.setattr(threading.Thread, "join", interrupted)
        recording.save(clip)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_encoder_waits_for_the_clip(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets all frames and then the error. If the caller leaves instead, the thread still ends."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "encode", full)
    monkeypatch.setattr(recording_module, "MAX_WAITING", 1)
    for saved in (True, False):
        with Recording(tmp_path / "clip.mp4") as recording:
            record(clip, recording, (1,) * 16)
            if saved:
                with pytest.raises(OutputError, match=r"^output: '.*clip.mp4' cannot be written: No space left"):
                    recording.save(clip)
        assert list(tmp_path.iterdir()) == []
        assert not [thread for thread in threading.enumerate() if thread.name == "encoder"]


def test_a_recording_refuses_what_a_clip_would_refuse(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'.avi' is not a known format"):
        Recording(tmp_path / "clip.avi")
    with pytest.raises(InvalidRequest, match="fps: 0 is not allowed"):
        Recording(tmp_path / "clip.mp4", fps=0)
    with pytest.raises(OutputError, match="cannot be written"):
        Recording("/proc/x/clip.mp4")
    with Recording(tmp_path / "new" / "clip.mp4") as recording:  # meanwhile a file replaces the folder
        (tmp_path / "new").write_text("")
        record(clip, recording, (16,))
        with pytest.raises(OutputError, match="cannot be written"):
            recording.save(clip)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_a_recording_takes_one_clip_in_order(clip: Clip, tmp_path: Path) -> None:
    with Recording(tmp_path / "clip.mp4") as recording:
        record(clip, recording, (8,))
        for first in (0, 7, 9):
            with pytest.raises(InvalidRequest, match=f"frames: {first} is not the next frame"):
                recording.add(first, clip.frames[:8])
