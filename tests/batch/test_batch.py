"""`sparsectrl-lcm batch`: clips and results, failures, and what `--resume` makes again."""

from pathlib import Path
from typing import Any

import pytest
from bundles import with_other_motion_module
from PIL import Image
from sparsectrl_lcm.batch import results_file
from sparsectrl_lcm.batch.ray_pipelines import EncodedClip, RemotePipeline
from sparsectrl_lcm.batch.results_file import open_results
from sparsectrl_lcm.runtime import ClipRequest, DeviceLost
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle
from sparsectrl_lcm.runtime.output import writers

from .conftest import SMALL, Ran, batch, clips, results, write


def test_a_clip_and_a_result_for_each_line(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(SMALL | {"seed": 5}, "", SMALL | {"seed": 6, "id": "Zwölf boats"})
    assert batch() == 0
    assert clips() == {"000001.gif", "Zwölf boats.gif"}
    found = results()
    assert [(item["line"], item["id"], item["file"], item["seed"], item["status"]) for item in found] == [
        (1, "000001", "000001.gif", 5, "done"),
        (3, "Zwölf boats", "Zwölf boats.gif", 6, "done"),
    ]
    assert all(item["seconds"] >= 0 for item in found)
    captured = capsys.readouterr()
    assert captured.out == "out: 2 made, 0 kept, 0 failed\n"
    assert "2/2" in captured.err
    assert "clips/" in captured.err


def test_a_failure_while_a_clip_is_made_is_told_and_tried_again(ran: Ran) -> None:
    write(*(SMALL | {"seed": seed} for seed in range(3)))
    ran.faults = {1: RuntimeError("a fault of a library\nwith details")}
    assert batch() == 1
    assert results()[1]["error"] == {"field": "", "reason": "a fault of a library", "remedy": ""}
    assert clips() == {"000001.gif", "000003.gif"}
    ran.faults = {}
    ran.requests.clear()
    assert batch("--resume") == 0
    assert ran.seeds == [1]
    assert results()[-1]["status"] == "done"


def test_a_lost_device_ends_the_batch_and_the_rest_is_made_later(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(*(SMALL | {"seed": seed} for seed in range(5)))
    ran.faults = {2: DeviceLost("backend", "the device has fallen off")}
    assert batch() == 2
    assert capsys.readouterr().err.endswith("error: backend: the device has fallen off\n")
    ran.faults = {}
    ran.requests.clear()
    assert batch("--resume") == 0
    assert ran.seeds == [2, 3, 4]


def test_a_full_disk_ends_the_batch(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write(*(SMALL | {"seed": seed} for seed in range(9)))
    with monkeypatch.context() as patch:
        patch.setitem(writers._WRITERS, ".gif", full)
        assert batch() == 2
    assert capsys.readouterr().err.endswith("'out/000001.gif' cannot be written: No space left on device\n")
    assert len(ran.seeds) <= 3
    assert not Path("out").exists()
    assert batch("--resume") == 0
    assert ran.seeds == list(range(9))


def test_a_batch_goes_on_only_if_told_so(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(SMALL | {"seed": 1})
    assert batch("--resume") == 0, "there is nothing yet"
    assert ran.seeds == [1]
    assert batch() == 2
    assert "results.jsonl' exists; give --resume to go on" in capsys.readouterr().err
    assert batch("--resume") == 0
    assert ran.seeds == []
    assert capsys.readouterr().out == "out: 0 made, 1 kept, 0 failed\n"


def test_a_batch_that_wrote_no_result_needs_no_resume(ran: Ran) -> None:
    with open_results(Path("out"), resume=False):
        pass
    write(SMALL | {"seed": 1})
    assert batch() == 0
    assert ran.seeds == [1]


def test_clips_that_are_there_are_looked_at_once_and_not_counted(
    ran: Ran, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(*(SMALL | {"seed": seed} for seed in range(3)))
    assert batch() == 0
    Path("out/000002.gif").unlink()
    seen: list[str] = []
    checksum = results_file.checksum
    monkeypatch.setattr(results_file, "checksum", lambda path: seen.append(path.name) or checksum(path))
    capsys.readouterr()
    assert batch("--resume") == 0
    assert seen == ["000001.gif", "000002.gif", "000003.gif"]
    assert "1/1" in capsys.readouterr().err


def changed_line() -> None:
    write(SMALL | {"seed": 1, "id": "a"}, SMALL | {"seed": 2, "id": "b", "prompt": "a cat"})


def changed_picture() -> None:
    Image.new("RGB", (64, 64), "white").save("a.png")


def changed_clip() -> None:
    content = Path("out/b.gif").read_bytes()
    Path("out/b.gif").write_bytes(content[:-9] + bytes(9))


@pytest.mark.parametrize("change", [changed_line, changed_picture, changed_clip, lambda: Path("out/b.gif").unlink()])
def test_what_changed_is_made_again(ran: Ran, change: Any) -> None:
    Image.new("RGB", (64, 64), "black").save("a.png")
    write(SMALL | {"seed": 1, "id": "a"}, SMALL | {"seed": 2, "id": "b", "keyframe_0_image_url": "a.png"})
    assert batch() == 0
    assert ran.seeds == [1, 2]
    change()
    assert batch("--resume") == 0
    assert ran.seeds == [2]
    assert batch("--resume") == 0
    assert ran.seeds == []
    assert [item["id"] for item in results()] == ["a", "b", "b"]


def test_another_order_or_spelling_of_a_line_is_no_change(ran: Ran) -> None:
    write(SMALL | {"id": "a", "seed": 1}, SMALL | {"id": "b", "seed": 2})
    assert batch() == 0
    before = {name: Path("out", name).read_bytes() for name in clips()}
    write({"seed": 2, "id": "b", "fps": 8} | SMALL, {"id": "a", "seed": 1, "negative_prompt": ""} | SMALL)
    ran.requests.clear()
    assert batch("--resume") == 0
    assert ran.seeds == []
    Path("out").rename("first")
    assert batch() == 0
    assert {name: Path("out", name).read_bytes() for name in clips()} == before


def comment(name: str) -> object:
    with Image.open(Path("out", name)) as image:
        return image.info.get("comment")


def test_clips_say_what_they_were_made_from_unless_told_not_to(ran: Ran) -> None:
    write(SMALL | {"seed": 1})
    assert batch() == 0
    assert b'"prompt": "a boat"' in comment("000001.gif")  # type: ignore[operator]
    for _ in range(2):
        assert batch("--resume", "--no-metadata") == 0
        assert comment("000001.gif") is None
    assert ran.seeds == [1, 1], "once with and once without"
    request = ClipRequest("a boat", seed=1, width=64, height=64, num_frames=2)
    for metadata in (True, False):
        made, _ = RemotePipeline(None, {}).make(request, "a.gif", 8, metadata)
        assert isinstance(made, EncodedClip)
        assert (b'"prompt": "a boat"' in made.content) == metadata, "on Ray"


def test_another_model_makes_all_again(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    write(SMALL | {"seed": 1})
    assert batch() == 0
    bundle = Bundle.load()
    other = bundle.manifest.model_copy(update={"created_by": "another export"})
    monkeypatch.setattr(Bundle, "load", lambda *_: Bundle(bundle.folder, other))
    assert batch("--resume") == 0
    assert ran.seeds == [1, 1]


def test_lines_name_their_weights(ran: Ran, tmp_path: Path) -> None:
    """If a name gets another bundle, its clips are made again."""
    first, second = (with_other_motion_module(demo_bundle(), tmp_path / f"{seed}", seed) for seed in (1, 2))
    named = [{"sparsectrl_lcm": {"weights": name}} for name in ("anime", "x")]
    write(SMALL | {"seed": 1}, SMALL | {"seed": 2} | named[0], SMALL | {"seed": 3} | named[1])
    assert batch("--weights", f"anime={first}") == 1
    assert [(request.seed, request.weights) for request in ran.requests] == [(1, None), (2, "anime")]
    wrong = next(item["error"] for item in results() if item["status"] == "error")
    told = {"field": "sparsectrl_lcm.weights", "reason": "'x' is not allowed", "remedy": "allowed are anime"}
    assert wrong == told
    assert b'"bundle": "1"' in comment("000002.gif")  # type: ignore[operator]
    for bundle, made in ((first, []), (second, [2])):
        ran.requests.clear()
        assert batch("--resume", "--weights", f"anime={bundle}") == 1
        assert ran.seeds == made


def test_a_folder_has_one_batch_at_a_time(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(SMALL)
    with open_results(Path("out"), resume=False):
        assert batch("--resume") == 2
    assert capsys.readouterr().err == "error: --output: another batch is writing to 'out'\n"


@pytest.mark.parametrize(
    ("arguments", "requests", "message"),
    [
        (("--format", "avi"), "requests.jsonl", "error: --format: 'avi' is not allowed; give mp4, webm"),
        (("--weights", "anime"), "requests.jsonl", "error: --weights: 'anime' is not allowed; give NAME=BUNDLE"),
        (
            ("--weights", "anime=nowhere"),
            "requests.jsonl",
            "error: --weights: anime: 'nowhere' is not a folder; name one",
        ),
        ((), "missing.jsonl", "error: requests: 'missing.jsonl' cannot be read: No such file or directory; name"),
    ],
)
def test_wrong_options_are_one_line(
    ran: Ran, arguments: tuple[str, ...], requests: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(SMALL)
    assert batch(*arguments, requests=requests) == 2
    assert capsys.readouterr().err.startswith(message)


def test_results_that_are_none_are_told(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(SMALL | {"seed": 1})
    assert batch() == 0
    with Path("out/results.jsonl").open("a") as file:
        file.write("17\n")
    capsys.readouterr()
    assert batch("--resume") == 2
    expected = "error: --output: line 2 of 'out/results.jsonl' is not a result; remove it, or name another folder\n"
    assert capsys.readouterr().err == expected
