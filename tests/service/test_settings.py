"""Limits from the command line, and their use in the runner's process."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from sparsectrl_lcm.cli import app
from sparsectrl_lcm.runtime import InvalidRequest
from sparsectrl_lcm.runtime.load_options import LoadOptions
from sparsectrl_lcm.service.runner import devices
from sparsectrl_lcm.service.runner import pipeline_loading as loading
from sparsectrl_lcm.service.settings import LIMITS, Settings, with_limits
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


def test_values_take_the_type_of_their_setting() -> None:
    settings = with_limits(Settings(Path("x")), ["key_queue=7", "step_seconds=1.5", "object_seconds=none", "retries=0"])
    assert (settings.key_queue, settings.step_seconds, settings.object_seconds, settings.retries) == (7, 1.5, None, 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key_que=7", "key_que: unknown; there are "),
        ("anonymous=1", "anonymous: unknown"),
        ("key_queue", "key_queue: not allowed; give NAME=VALUE"),
        ("key_queue=", "key_queue: '' is not allowed; give a whole number"),
        ("key_queue=1.5", "'1.5' is not allowed; give a whole number"),
        ("step_seconds=soon", "'soon' is not allowed; give a number"),
        ("object_seconds=soon", "'soon' is not allowed; give a number or none"),
        ("step_seconds=0", "step_seconds: 0.0 is not allowed; give more than 0"),
        ("step_seconds=nan", "give more than 0"),
        ("drain_seconds=-1", "give 0 or more"),
        ("step_seconds=none", "'none' is not allowed; give a number"),
    ],
)
def test_a_wrong_limit_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--data", str(tmp_path / "data"), "--set", text])
    assert done.exit_code != 0
    said = f"{done.output}{done.exception or ''}"
    assert f"--set {text.partition('=')[0]}" in said and told in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text", ["runners=2", "gpus_per_replica=0.5"])
def test_an_option_of_serve_is_no_limit(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="unknown"):
        with_limits(Settings(tmp_path), [text])


@pytest.mark.parametrize(
    "url", ["https://a.example", "http://10.0.0.1:8000/", "https://[fd00::7]:8443", "http://b-1_c/"]
)
def test_a_public_url_is_scheme_and_host(tmp_path: Path, url: str) -> None:
    assert Settings(tmp_path, public_url=url).public_url == url


def test_what_may_be_zero(tmp_path: Path) -> None:
    taken = []
    for name in LIMITS:
        with contextlib.suppress(InvalidRequest):
            with_limits(Settings(tmp_path), [f"{name}=0"])
            taken.append(name)
    assert sorted(taken) == [
        *("drain_seconds", "fetch_redirects", "free_bytes", "private_seconds", "request_seconds", "retries"),
        *("webhook_attempts", "webhook_wait_seconds"),
    ]


def test_every_limit_is_documented_with_its_default() -> None:
    table = (ROOT / "docs/service.md").read_text().partition("| limit | default | bounds |")[2].partition("\n\n")[0]
    documented: dict[str, float] = {}
    for row in table.splitlines()[2:]:
        _, names, defaults, *_ = (cell.strip() for cell in row.split("|"))
        documented |= zip(names.replace("`", "").split(", "), map(number, defaults.split(", ")), strict=True)
    assert documented == {name: getattr(Settings(Path("x")), name) for name in LIMITS}


def number(text: str) -> float:
    """A default as the table writes it, such as 12 MiB or a week."""
    value, _, unit = text.partition(" ")
    units = {"": 1, "MiB": 2**20, "GiB": 2**30, "million": 10**6}
    units |= {"hour": 3600, "week": 7 * 86400, "year": 365 * 86400}
    return (1.0 if value in ("a", "an") else float(value.replace(",", ""))) * units[unit]


@pytest.mark.parametrize(
    ("backend", "threads", "cores", "taken"),
    [("onnxruntime", None, 8, 7), ("onnxruntime", None, 1, 1), ("onnxruntime", 8, 8, 8), ("tensorrt", None, 8, None)],
)
def test_the_server_keeps_a_core(
    monkeypatch: pytest.MonkeyPatch, backend: str, threads: int | None, cores: int, taken: int | None
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(devices, "physical_cores", lambda: cores)
    monkeypatch.setattr(loading, "open_graphs", lambda _: None)
    monkeypatch.setattr(loading.VideoPipeline, "load", lambda bundle, backend, **options: asked.update(options))
    loading.load(None, backend, threads=threads)
    assert asked["threads"] == taken


def test_auto_chooses_a_backend_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "open_graphs", lambda _: None)  # OpenVINO compiles for 20 s
    pipeline = loading.load()
    assert pipeline.backend in ("openvino", "onnxruntime")


def test_the_backend_that_auto_chooses_has_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[LoadOptions] = []
    monkeypatch.setattr(loading, "choose_backend", lambda _, options: chosen.append(options) or "onnxruntime")
    monkeypatch.setattr(loading, "open_graphs", lambda _: None)
    monkeypatch.setattr(loading.VideoPipeline, "load", lambda *_, **__: None)
    loading.load(None, precision="fp16", device="GPU")
    assert chosen == [LoadOptions(precision="fp16", device="GPU")]
