"""A batch in a temporary folder, with a pipeline that is quick."""

import json
from pathlib import Path
from typing import Any

import pytest
from fakes.quick_executor import quick_pipeline
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.checked_request import CheckedRequest

from sparsectrl_lcm import cli

SMALL = {"prompt": "a boat", "width": 64, "height": 64, "frames": 2}


class Ran:
    """Records the requests that the pipeline runs; `faults` has what it raises for a seed."""

    def __init__(self) -> None:
        self.requests: list[CheckedRequest] = []
        self.faults: dict[int, BaseException] = {}

    def __call__(self, request: CheckedRequest) -> None:
        self.requests.append(request)
        if request.seed in self.faults:
            raise self.faults[request.seed]

    @property
    def seeds(self) -> list[int]:
        seeds = [request.seed for request in self.requests]
        self.requests.clear()
        return seeds


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ran:
    ran = Ran()
    monkeypatch.setattr(VideoPipeline, "load", lambda *_, weights=None, **__: quick_pipeline(ran, weights))
    monkeypatch.chdir(tmp_path)
    return ran


def write(*lines: object) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    Path("requests.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def batch(*arguments: object, requests: str = "requests.jsonl") -> int:
    ending = [] if "--format" in arguments else ["--format", "gif"]
    return cli.run(["batch", requests, "-o", "out", *ending, *map(str, arguments)])


def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]


def clips() -> set[str]:
    return {path.name for path in Path("out").iterdir()} - {"results.jsonl", ".lock"}
