"""What programs use that embed the pipeline: `with`, sizes, open files, tasks of asyncio, notebooks."""

import asyncio
import base64
import io
import threading
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from sparsectrl_lcm.runtime import Clip, InvalidRequest, Keyframe, OutputError, VideoPipeline
from sparsectrl_lcm.runtime.images import load_picture

SMALL: dict[str, Any] = {"num_frames": 2, "num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipeline() -> VideoPipeline:
    return VideoPipeline.load(backend="onnxruntime")


@pytest.fixture
def clip() -> Clip:
    return Clip(np.random.default_rng(1).integers(0, 255, (3, 32, 48, 3), np.uint8), seed=1, timings={})


def test_a_block_closes_the_pipeline_also_after_an_error() -> None:
    closed: list[bool] = []
    executor: Any = SimpleNamespace(close=lambda: closed.append(True))
    bundle: Any = None
    with VideoPipeline(bundle, executor) as pipeline:
        assert isinstance(pipeline, VideoPipeline)
        assert not closed
    assert closed == [True]
    with pytest.raises(KeyError), VideoPipeline(bundle, executor):
        raise KeyError
    assert closed == [True, True]


def test_the_pipeline_tells_its_default_size(pipeline: VideoPipeline) -> None:
    clip = pipeline.generate("a star", num_inference_steps=1, seed=1)
    assert clip.frames.shape == (pipeline.num_frames, pipeline.height, pipeline.width, 3)


@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "webp", "png"])
def test_an_open_file_gets_the_bytes_of_a_saved_file(clip: Clip, tmp_path: Path, format: str) -> None:
    expected = clip.save(tmp_path / f"clip.{format}", fps=12).read_bytes()
    assert clip.to_bytes(format, fps=12) == expected
    file = io.BytesIO()
    assert clip.save(file, fps=12, format=format) is None
    assert file.getvalue() == expected
    with (tmp_path / "unbuffered").open("wb", buffering=0) as raw:
        clip.save(raw, fps=12, format=format)
        assert not raw.closed
    assert (tmp_path / "unbuffered").read_bytes() == expected


def test_a_format_is_checked(clip: Clip, tmp_path: Path) -> None:
    for wrong in (None, "tiff", "", "../mp4", 3):
        with pytest.raises(InvalidRequest, match=r"format: .* allowed are mp4, webm") as caught:
            clip.save(io.BytesIO(), format=wrong)  # type: ignore[call-overload]
        assert caught.value.field == "format"
    with pytest.raises(InvalidRequest, match="format: the ending of a path"):
        clip.save(tmp_path / "clip.gif", format="gif")  # type: ignore[call-overload]
    with pytest.raises(InvalidRequest, match="fps"):
        clip.to_bytes("gif", fps=60)


def test_a_file_that_cannot_be_written_is_an_error_of_the_package(clip: Clip, tmp_path: Path) -> None:
    closed = io.BytesIO()
    closed.close()
    with (tmp_path / "empty").open("w+b") as empty:
        pass
    with pytest.raises(OutputError, match="output: the file cannot be written"):
        clip.save(closed, format="png")
    with (tmp_path / "empty").open("rb") as empty, pytest.raises(OutputError, match="cannot be written"):
        clip.save(empty, format="png")
    with pytest.raises(InvalidRequest, match="open as text; open it with mode 'wb'"):
        clip.save(io.StringIO(), format="png")  # type: ignore[call-overload]
    with pytest.raises(InvalidRequest, match="output: int is not allowed"):
        clip.save(3, format="png")  # type: ignore[call-overload]


def test_a_notebook_shows_the_clip_as_a_video(clip: Clip) -> None:
    found: list[dict[str, str | None]] = []

    class Videos(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag == "video"
            found.append(dict(attributes))

    Videos().feed(clip._repr_html_())
    (video,) = found
    kind, data = str(video["src"]).split(",")
    assert kind == "data:video/mp4;base64"
    with av.open(io.BytesIO(base64.b64decode(data, validate=True))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 3
    assert frames[0].shape == (int(str(video["height"])), int(str(video["width"])), 3)


def test_a_keyframe_is_read_from_an_open_file_more_than_once(pipeline: VideoPipeline, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 255, (64, 64, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    with (tmp_path / "picture.png").open("rb") as file:
        for _ in range(2):
            clip = pipeline.generate("a star", [Keyframe(0, file)], controlnet="rgb", seed=1, **SMALL)
            assert np.array_equal(clip.keyframes[0].pixels, np.asarray(picture))
        assert not file.closed
    for wrong in (io.BytesIO(b"no picture"), io.StringIO("text"), file):
        with pytest.raises(InvalidRequest, match="keyframe 3: "):
            load_picture(wrong, "keyframe 3")


def test_a_task_gets_the_clip_while_the_event_loop_goes_on(pipeline: VideoPipeline) -> None:
    expected = pipeline.generate("a star", seed=1, **SMALL)

    async def clips() -> list[Clip]:
        reached, loop = asyncio.Event(), asyncio.get_running_loop()
        goes_on = threading.Event()

        def report(progress: Any) -> None:
            loop.call_soon_threadsafe(reached.set)
            assert goes_on.wait(20), "the event loop did not go on"

        first = asyncio.create_task(pipeline.generate_async("a star", seed=1, on_progress=report, **SMALL))
        second = asyncio.create_task(pipeline.generate_async("a star", seed=1, **SMALL))
        await reached.wait()
        goes_on.set()
        return await asyncio.gather(first, second)

    for clip in asyncio.run(asyncio.wait_for(clips(), 60)):
        assert np.array_equal(clip.frames, expected.frames)


def test_a_cancelled_task_ends_its_run_within_a_step(pipeline: VideoPipeline) -> None:
    told: list[Any] = []

    async def cancel() -> None:
        loop, reached = asyncio.get_running_loop(), asyncio.Event()
        cancelled = threading.Event()

        def report(progress: Any) -> None:
            told.append(progress)
            if (progress.stage, progress.step) == ("denoise", 1):
                loop.call_soon_threadsafe(reached.set)
                assert cancelled.wait(20)

        options = SMALL | {"num_inference_steps": 8}
        running = asyncio.create_task(pipeline.generate_async("a star", on_progress=report, **options))
        waiting = asyncio.create_task(pipeline.generate_async("a star", on_progress=told.append, **options))
        await reached.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        running.cancel()
        await asyncio.sleep(0)  # the task hears of it
        cancelled.set()
        await asyncio.wait([running])
        assert running.cancelled()
        assert not pipeline._lock.locked(), "the run has ended"

    asyncio.run(asyncio.wait_for(cancel(), 60))
    assert (told[-1].stage, told[-1].step) == ("denoise", 1)


def test_errors_of_a_task_are_those_of_the_package(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match="num_inference_steps"):
        asyncio.run(pipeline.generate_async("a star", num_inference_steps=99))
