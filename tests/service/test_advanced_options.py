"""Options that fal's endpoint lacks, in an object of their own."""

from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.stub_pipeline import SIDE, StubPipeline
from PIL import Image
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.images import fit
from sparsectrl_lcm.service.protocol.advanced_options import KEY, AdvancedOptions
from sparsectrl_lcm.service.protocol.clip_input import Input
from sparsectrl_lcm.service.protocol.errors import ServiceError
from sparsectrl_lcm.service.protocol.input_parsing import MOST_DETAILS, parse_input
from sparsectrl_lcm.service.queue.dispatcher import _job_error
from sparsectrl_lcm.service.runner import JobFailed
from sparsectrl_lcm.service.runner.clip_jobs import ClipOrder, Jobs


def test_given_options_reach_the_pipeline_and_the_store() -> None:
    given = {"prompt": "a", KEY: {"conditioning_scale": 0.5}}
    parsed = parse_input(given, 100, 16)
    assert parsed.options()["conditioning_scale"] == 0.5
    assert parsed.stored() == given
    assert Input.model_validate(parsed.stored()).model_dump() == parsed.model_dump()
    assert parse_input({"prompt": "a"}, 100, 16).stored() == {"prompt": "a"}
    assert parse_input({"prompt": "a", KEY: None}, 100, 16).options() == parse_input({"prompt": "a"}, 100, 16).options()


def test_previews_are_no_option_of_the_pipeline() -> None:
    asked, plain = (parse_input({"prompt": "a", **more}, 100, 16) for more in ({KEY: {"previews": True}}, {}))
    assert asked.options() == plain.options()
    assert (asked.advanced.previews, plain.advanced.previews) == (True, False)
    assert Input.model_validate(asked.stored()).advanced.previews


def test_every_option_has_the_name_and_default_of_the_pipeline() -> None:
    arguments = signature(VideoPipeline.generate).parameters
    options = AdvancedOptions()
    names = AdvancedOptions.model_fields.keys() - {"previews"}
    assert {name: arguments[name].default for name in names} == options.model_dump(include=names)
    assert AdvancedOptions.model_fields.keys().isdisjoint(Input(prompt="a").options())


@pytest.mark.parametrize(
    ("given", "field", "kind"),
    [
        ({"conditioning_scale": 11}, ["conditioning_scale"], "less_than_equal"),
        ({"conditioning_scale": float("nan")}, ["conditioning_scale"], "finite_number"),
        ({"control_guidance_end": "late"}, ["control_guidance_end"], "float_parsing"),
        ({"conditioning": 1}, ["conditioning"], "extra_forbidden"),
        ({"clip_skip": 10**400}, ["clip_skip"], "less_than_equal"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, ["control_guidance_start"], "less_than"),
        ({"control_guidance_start": 1}, ["control_guidance_start"], "less_than"),
        (3, [], "dict_type"),
    ],
)
def test_wrong_options_are_named(given: Any, field: list[str], kind: str) -> None:
    with pytest.raises(ServiceError) as error:
        parse_input({"prompt": "a", KEY: given}, 100, 16)
    (detail,) = error.value.body["detail"]
    assert (detail["loc"], detail["type"]) == (["body", KEY, *field], kind)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("conditioning_scale", (0, 10)),
        ("control_guidance_start", (0, 0.9)),
        ("control_guidance_end", (0.1, 1)),
        ("clip_skip", (0, 100)),
    ],
)
def test_bounds_are_allowed(name: str, values: tuple[float, float]) -> None:
    for value in values:
        assert parse_input({"prompt": "a", KEY: {name: value}}, 100, 16).options()[name] == value


def test_a_wrong_choice_lists_the_right_ones() -> None:
    with pytest.raises(ServiceError) as error:
        parse_input({"prompt": "a", "controlnet_type": "x", KEY: {"resample": "nearest"}}, 100, 16)
    assert [detail["ctx"]["expected"] for detail in error.value.body["detail"]] == [
        ["scribble", "rgb"],
        ["lanczos", "bilinear"],
    ]


def test_thousands_of_unknown_options_give_a_short_response() -> None:
    with pytest.raises(ServiceError) as error:
        parse_input({"prompt": "a", KEY: {f"option_{number}": 1 for number in range(5000)}}, 100, 16)
    assert len(error.value.body["detail"]) == MOST_DETAILS


def test_an_option_that_the_bundle_refuses_is_named() -> None:
    error = _job_error(JobFailed("invalid", "0.2 is before the start", field="control_guidance_end"), ())
    assert error.body["detail"][0]["loc"] == ["body", KEY, "control_guidance_end"]


def test_the_runner_resizes_keyframes_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resizes a picture when it reads it, so that a large one does not stay in memory."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3 * SIDE, 3 * SIDE, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    pipeline, taken = StubPipeline(None, "stub", None), []
    generate = pipeline.generate

    def remember(**options: Any) -> Any:
        taken.append(options["keyframes"][0].image)
        return generate(**options)

    monkeypatch.setattr(pipeline, "generate", remember)
    jobs = Jobs(pipeline, 10**6)
    reports = SimpleNamespace(say=lambda *_, **__: None, cancelled=SimpleNamespace(is_set=bool))
    for options in ({}, {"resample": "bilinear"}):
        keyframes = [(0, str(tmp_path / "picture.png"))]
        jobs.make(reports, ClipOrder({"prompt": "a", **options}, keyframes, str(tmp_path / "clip.mp4")))
        jobs.finish()
    assert (taken[0] == fit(picture, SIDE, SIDE)).all()
    assert (taken[1] == fit(picture, SIDE, SIDE, "bilinear")).all()
    assert (taken[0] != taken[1]).any()
