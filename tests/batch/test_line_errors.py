"""The errors of lines: each says which field it is, why, and what to write instead."""

import pytest

from .conftest import SMALL, Ran, batch, clips, results, write

TOLD = {
    "num_frames": (4, "there is no such field", "use frames"),
    "num_inference_step": (4, "there is no such field", "did you mean num_inference_steps?"),
    "controlnet": ("rgb", "there is no such field", "use controlnet_type"),
    "weights": ("anime", "there is no such field", "use sparsectrl_lcm.weights"),
    "output_format": ("gif", "there is no such field", "give --format to the command, for all clips"),
    "num_inference_steps": (99, "99 is not allowed", "give at most 12"),
    "seeds": (0, "0 is not allowed", "give at least 1"),
    "frames": (2.5, "2.5 is not allowed", "give a valid integer"),
    "controlnet_type": ("depth", "'depth' is not allowed", "give 'scribble' or 'rgb'"),
    "sparsectrl_lcm": (1, "1 is not allowed", "give an object"),
    "id": (
        "../y",
        "'../y' is not allowed",
        "give up to 100 letters, digits, spaces and _ . + -, with a letter, digit or _ first and no space or . last",
    ),
}


def test_each_error_says_what_to_write_instead(ran: Ran) -> None:
    write(*(SMALL | {field: value} for field, (value, *_) in TOLD.items()))
    assert batch() == 1
    errors = {item["error"]["field"]: (item["error"]["reason"], item["error"]["remedy"]) for item in results()}
    assert errors == {field: (reason, remedy) for field, (_, reason, remedy) in TOLD.items()}


def test_weights_that_the_pipeline_does_not_have(ran: Ran) -> None:
    write(SMALL | {"sparsectrl_lcm": {"weights": "anime"}})
    assert batch() == 1
    remedy = "leave it out, as this pipeline was loaded with no other weights"
    assert results()[0]["error"] == {
        "field": "sparsectrl_lcm.weights",
        "reason": "'anime' is not allowed",
        "remedy": remedy,
    }


def test_one_error_that_is_not_printed(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    write(*("no JSON" for _ in range(11)))
    assert batch() == 1
    assert capsys.readouterr().err.endswith("and 1 more error, in out/results.jsonl\n")


def test_negative_seeds_are_recorded_as_given(ran: Ran) -> None:
    """The noise is that of the seed plus 2**64, as torch's generators take negative seeds."""
    write(SMALL | {"id": "a", "seed": -1}, SMALL | {"id": "b", "seed": -1, "seeds": 2})
    assert batch() == 0
    assert ran.seeds == [2**64 - 1, 2**64 - 1, 0]
    assert {item["id"]: item["seed"] for item in results()} == {"a": -1, "b-seed-1": -1, "b-seed0": 0}
    assert clips() == {"a.gif", "b-seed-1.gif", "b-seed0.gif"}
