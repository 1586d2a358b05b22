"""The files that results go to, and the command line in them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import reports


def test_earlier_results_of_the_day_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    found = []
    for _ in range(3):
        found.append(reports.results_file("run", folder=folder))
        found[-1].touch()
    first, second, third = found
    assert first.name.endswith("-run.json")
    assert (second.name, third.name) == (first.stem + "-2.json", first.stem + "-3.json")
    assert reports.results_file("run", tmp_path / "new" / "mine.json").parent.is_dir()


def test_commands_name_no_place_of_a_machine() -> None:
    given = ["/home/me/benchmarks/compare.py", "--cache", "/a", "--size", "64x64", "--output=/b", "--rounds", "1"]
    assert reports.command(given) == "python benchmarks/compare.py --size 64x64 --rounds 1"


def test_every_program_reads_its_arguments_so_that_help_measures_nothing() -> None:
    programs = {path.name: path.read_text() for path in Path(reports.__file__).parent.glob("*.py")}
    children = {"models.py", "diffusers_worker.py", "gpu_worker.py"}
    by_hand = {name for name, text in programs.items() if '"__main__"' in text} - children
    assert len(by_hand) > 10
    assert {name for name in by_hand if ".parse_args(" not in programs[name]} == set()
