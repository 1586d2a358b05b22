"""Files, read back with PyAV and Pillow."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from gradient_clips import decode, gradient_clip
from PIL import Image
from sparsectrl_lcm.runtime import Clip, InvalidRequest, OutputError


@pytest.fixture
def clip() -> Clip:
    return gradient_clip()


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "h264"), ("clip.webm", "vp9"), ("CLIP.MP4", "h264")])
@pytest.mark.parametrize("fps", [8, 12.5, 24])
def test_video(clip: Clip, tmp_path: Path, name: str, codec: str, fps: float) -> None:
    path = clip.save(tmp_path / name, fps=fps)
    container, frames = decode(path)
    stream = container.streams.video[0]
    assert stream.codec_context.name == codec or codec in stream.codec_context.name
    assert stream.codec_context.pix_fmt == "yuv420p"
    tags = stream.codec_context
    assert int(tags.colorspace) == 6, "the matrix of BT.601"
    assert (tags.color_primaries, tags.color_trc) == (1, 1), "sRGB frames have the primaries of BT.709"
    assert float(stream.average_rate) == pytest.approx(fps)
    assert len(frames) == 16
    assert np.abs(np.stack(frames).astype(int) - clip.frames).mean() < 6
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_a_player_that_honours_the_tags_shows_the_colours(tmp_path: Path, name: str) -> None:
    """Converted to BT.709 by ffmpeg's filter, which looks at matrix, primaries and transfer."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)]
    frames = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in colours])
    path = Clip(frames=frames, seed=1, timings={}).save(tmp_path / name)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        steps = [
            graph.add_buffer(template=stream),
            graph.add("colorspace", "all=bt709:format=yuv420p"),
            graph.add("scale", "in_color_matrix=bt709"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        for step, following in itertools.pairwise(steps):
            step.link_to(following)
        graph.configure()
        for colour, frame in zip(colours, container.decode(stream), strict=True):
            graph.push(frame)
            shown = graph.pull().to_ndarray()[30, 30]
            assert np.abs(shown.astype(int) - colour).max() <= 6, (colour, shown)


def test_mp4_starts_fast(clip: Clip, tmp_path: Path) -> None:
    content = clip.save(tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
def test_animations(clip: Clip, tmp_path: Path, name: str) -> None:
    with Image.open(clip.save(tmp_path / name, fps=8)) as image:
        assert image.n_frames == 16
        assert image.info["loop"] == 0
        durations = []
        for index in range(16):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - clip.frames[index]).mean() < 12
    assert set(durations) <= {120, 125, 130}
    assert sum(durations) == 2000, "16 frames at 8 fps"


def test_contact_sheet_has_keyframes_above_their_frames(clip: Clip, tmp_path: Path) -> None:
    with Image.open(clip.save(tmp_path / "sheet.png")) as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    places = {}
    for index, frame in enumerate(clip.frames):
        places[index] = find(sheet, frame)
    first_row = [places[index] for index in range(8)]
    assert [y for _, y in first_row] == [first_row[0][1]] * 8
    assert [x for x, _ in first_row] == sorted(x for x, _ in first_row)
    for keyframe in clip.keyframes:
        x, y = places[keyframe.index]
        above = sheet[y - 64 - 18 : y - 18, x : x + 96]
        assert (above == keyframe.pixels).all()


def find(sheet: np.ndarray, frame: np.ndarray) -> tuple[int, int]:
    height, width = frame.shape[:2]
    for y in range(sheet.shape[0] - height + 1):
        for x in np.flatnonzero((sheet[y, : sheet.shape[1] - width + 1] == frame[0, 0]).all(axis=1)):
            if (sheet[y : y + height, x : x + width] == frame).all():
                return int(x), y
    raise AssertionError("the frame is not on the sheet")


def test_folder_of_frames(clip: Clip, tmp_path: Path) -> None:
    folder = clip.save(tmp_path / "frames")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"frame_{index:03d}.png" for index in range(16)]
    for index, name in enumerate(names):
        assert (np.asarray(Image.open(folder / name)) == clip.frames[index]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_a_folder_that_is_there_is_filled_only_when_empty(clip: Clip, tmp_path: Path) -> None:
    target = tmp_path / "frames"
    target.mkdir()
    inode = target.stat().st_ino
    clip.save(target)
    assert target.stat().st_ino == inode, "it may be a mount point, so it is not replaced"
    assert len(list(target.iterdir())) == 16
    with pytest.raises(OutputError, match="is not empty; name a new one"):
        clip.save(target)
    assert len(list(target.iterdir())) == 16


def test_a_folder_that_is_there_may_have_any_name(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "take.2").mkdir()
    assert len(list(clip.save(tmp_path / "take.2").iterdir())) == 16


def test_the_longest_name_of_a_file_will_do(clip: Clip, tmp_path: Path) -> None:
    assert clip.save(tmp_path / f"{'x' * 251}.png").exists()


def test_missing_folders_are_made(clip: Clip, tmp_path: Path) -> None:
    assert clip.save(tmp_path / "a" / "b" / "clip.gif").exists()


def test_files_have_the_usual_rights(clip: Clip, tmp_path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert clip.save(tmp_path / "clip.gif").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("fps", [0, -1, 61, float("nan"), float("inf"), pytest.param(10**5000, id="huge"), "8", True])
def test_a_wrong_frame_rate_is_refused(clip: Clip, tmp_path: Path, fps: object) -> None:
    with pytest.raises(InvalidRequest, match="fps: .* give a number from 1 to 60"):
        clip.save(tmp_path / "clip.mp4", fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_a_gif_takes_no_rate_that_browsers_slow_down(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="fps: 51 is not allowed for .gif; give a number from 1 to 50"):
        clip.save(tmp_path / "clip.gif", fps=51)
    assert clip.save(tmp_path / "clip.gif", fps=50).exists()


def test_an_unknown_ending_is_refused(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'.avi' is not a known format; allowed are .mp4, .webm"):
        clip.save(tmp_path / "clip.avi")


def test_an_ending_without_a_name_is_refused(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"'.MP4' is an ending alone; put a name before it"):
        clip.save(tmp_path / ".MP4")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_outputs(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    reasons = {
        "folder.mp4": "is a folder; name a file in it",
        "file": "is a file; name a folder, or a file that ends in",
    }
    names = ("file/clip.mp4", *reasons, "/proc/x/clip.mp4", f"{'x' * 252}.png", "x" * 256, "a\0b.mp4")
    for name in names:
        with pytest.raises(OutputError, match=f"^output: .*{reasons.get(name, '')}") as error:
            clip.save(tmp_path / name)
        assert "\n" not in str(error.value)


SAVE = "    Clip(frames, 1, {}).save('clip.mp4')\n"
RECORD = (
    "    module.MAX_WAITING = 1\n"
    "    with module.Recording('clip.mp4') as recording:\n"
    "        for index in range(16):\n"
    "            recording.add(index, frames[index : index + 1])\n"
    "        recording.save(Clip(frames, 1, {}))\n"
)


@pytest.mark.parametrize("write", [SAVE, RECORD])
def test_a_failure_half_way_leaves_nothing(write: str, tmp_path: Path) -> None:
    """The disk is full while the file is written. An earlier file of that name stays."""
    before = b"the old clip"
    (tmp_path / "clip.mp4").write_bytes(before)
    code = (
        "import resource, signal, numpy as np\n"
        "from sparsectrl_lcm.runtime import Clip, OutputError\n"
        "from sparsectrl_lcm.runtime.output import recording as module\n"
        "import av\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "frames = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), dtype=np.uint8)\n"
        "try:\n"
        f"{write}"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "cannot be written" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == before
