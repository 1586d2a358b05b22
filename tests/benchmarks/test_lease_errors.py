"""What lease.py and lease_report.py cannot read or write ends in one line, and costs nothing that was measured."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import lease
import lease_prepare
import lease_report
from lease_bundle import holds_graphs_alone
from lease_stages.lines import Unusable
from lease_stages.processes import Settings
from lease_stages.schedule import Stage
from sparsectrl_lcm.runtime.format.bundle import demo_bundle

WHOLE = {"stage": "works", "state": "done", "seconds": 1.0, "rows": [{"first": "works"}]}
UNREADABLE = (
    '{"stage": "wor',
    "[1]",
    '{"stage": "works"}',
    '{"stage": "works", "state": "done", "seconds": 1, "rows": [2]}',
    "\0",
)
BLANK = ("", " ")

Patch = pytest.MonkeyPatch
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("left", [UNREADABLE[0], json.dumps(WHOLE)])
def test_a_line_without_an_end_costs_no_other(tmp_path: Path, left: str) -> None:
    (tmp_path / "lease.jsonl").write_text(left)
    list(lease.run_stages([Stage("device", 20.0, "none")], Settings("", str(tmp_path), "", ""), 0))
    lines, unreadable = lease_report.read_lines(tmp_path / "lease.jsonl")
    whole = left.endswith("}")
    assert [line["stage"] for line in lines] == (["works", "device"] if whole else ["device"])
    assert unreadable == (0 if whole else 1)


def test_rows_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "lease.jsonl").touch()
    (tmp_path / "works.rows").write_text('{"began": 1.0}\n{"first": 1}\n{"sec{"reason": "full"}\n{"third": 3}')
    (line,), _ = lease_report.read_lines(tmp_path / "lease.jsonl")
    assert line["rows"] == [{"first": 1}, {"third": 3}]


def report(patch: Patch, *arguments: Path | str) -> int:
    """Runs lease_report.py; returns its exit code."""
    patch.setattr(sys, "argv", ["lease_report.py", *map(str, arguments)])
    try:
        lease_report.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_the_report_leaves_out_unreadable_lines_and_says_how_many(
    monkeypatch: Patch, tmp_path: Path, capsys: Captured
) -> None:
    lines, result = tmp_path / "lease.jsonl", tmp_path / "result.json"
    lines.write_text("\n".join([*UNREADABLE, *BLANK, json.dumps(WHOLE)]))  # the last one has no end of line
    assert report(monkeypatch, lines, "--output", result) == 0
    assert [stage["stage"] for stage in json.loads(result.read_text())["stages"]] == ["works"]
    assert capsys.readouterr().err == f"{lines}: unreadable lines left out: {len(UNREADABLE)}\n"


def test_the_report_says_in_a_line_what_it_cannot_read_or_write(
    monkeypatch: Patch, tmp_path: Path, capsys: Captured
) -> None:
    bad, blank, good = (tmp_path / name for name in ("bad.jsonl", "blank.jsonl", "good.jsonl"))
    result = tmp_path / "result.json"
    bad.write_text("\n".join(UNREADABLE))
    blank.write_text("\n".join(BLANK))
    good.write_text(json.dumps(WHOLE))
    for arguments, said in (
        ((bad, "--output", result), f"{bad}: no line of a stage"),
        ((blank, "--output", result), f"{blank}: no line of a stage"),
        ((tmp_path / "none", "--output", result), f"{tmp_path / 'none'}: "),
        ((good, "--output", good / "result.json"), f"{good}: "),
        ((good, "--output", tmp_path), f"{tmp_path}: "),
    ):
        assert report(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {said}")
    assert not result.exists()


def test_bad_arguments_are_told_in_a_line(monkeypatch: Patch, tmp_path: Path, capsys: Captured) -> None:
    file, damaged, work = tmp_path / "file", tmp_path / "damaged.zip", tmp_path / "work"
    file.write_text("text")
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr("toy.py", "text text")
    damaged.write_bytes(damaged.read_bytes().replace(b"text text", b"text next"))
    output, none = ["--output", str(tmp_path / "out")], ["--packages", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "path", [*sys.path])
    for arguments, said in (
        ([*output, "--packages", str(file)], f"error: {file}: File is not a zip file"),
        ([*output, "--packages", str(damaged)], f"error: {damaged}: toy.py is damaged"),
        (["--output", str(file), *none], f"error: {file}: "),
        (["--output", str(file / "out"), *none], f"error: {file / 'out'}: "),
        *(([*output, "--budget", text], f"lease.py: error: argument --budget: {text} ") for text in ("-1", "nan", "0")),
    ):
        monkeypatch.setattr(sys, "argv", ["lease.py", *arguments, "--work", str(work)])
        monkeypatch.setenv("PYTHONPATH", "")
        with pytest.raises(SystemExit) as end:
            lease.main()
        assert end.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(said)
    assert not (tmp_path / "out").exists()
    assert not work.exists()


def test_packages_are_unpacked_into_no_folder_of_other_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
        archive.writestr("toy/__init__.py", "")
    mine = tmp_path / "folder" / "unpacked" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(Unusable, match=r"folder: was not made by lease\.py"):
        lease.unpacked(tmp_path / "packages.zip", tmp_path / "folder")
    assert mine.exists()


def test_the_packages_of_a_user_are_left_alone(monkeypatch: Patch, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
        archive.writestr("toy/__init__.py", "")
    mine = tmp_path / "packages" / "mine"
    mine.mkdir(parents=True)
    options = ["--packages", str(tmp_path / "packages.zip"), "--work", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lease.py", *options, "--stages", "kernels"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(lease, "run_stages", lambda stages, *_: [lease.not_started(stage, "") for stage in stages])
    with pytest.raises(SystemExit) as end:
        lease.main()
    assert end.value.code == 0
    assert mine.exists()


def test_preparing_replaces_graphs_and_nothing_else(monkeypatch: Patch, tmp_path: Path, capsys: Captured) -> None:
    graphs = tmp_path / "graphs"

    def prepare(bundle: Path) -> int:
        options = ["--only", "graphs", "--output", str(tmp_path), "--bundle", str(bundle)]
        monkeypatch.setattr(sys, "argv", ["lease_prepare.py", *options])
        try:
            lease_prepare.main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code
        return 0

    for _ in range(2):
        assert prepare(demo_bundle()) == 0
        assert holds_graphs_alone(graphs)
    assert prepare(tmp_path / "none") == 2
    assert holds_graphs_alone(graphs)
    assert not holds_graphs_alone(demo_bundle())
    (graphs / "manifest.json").unlink()
    capsys.readouterr()
    assert prepare(demo_bundle()) == 2
    assert capsys.readouterr().err.startswith(f"error: {graphs}: is no folder of graphs")
    assert list(graphs.iterdir())
