"""Graphs without torch's decompositions: when they are left out, and that results are those of torch."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparsectrl_lcm.export.check import largest_error, open_session
from sparsectrl_lcm.export.graph_specs import GraphSpec, Input
from sparsectrl_lcm.export.onnx_file import trace, write
from torch import nn

SPEC = GraphSpec("g", (Input("x", ("n", 4, "w")),), (("y", ("n", 4, "w")),))


class Composite(nn.Module):
    """Operators that ONNX has, among them composite ones of torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = F.dropout(x, training=False).double().float().chunk(2, dim=1)
        return F.instance_norm(torch.cat((second.contiguous(), first), dim=1).reshape(x.shape[0], 4, -1))


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = 2 * x
        view = doubled[:, 1]
        view.add_(1)
        return doubled


class Moved(nn.Module):
    """An operator without a counterpart in ONNX, which is in no table of decompositions either."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(0, 2).movedim(2, 0).positive()


@pytest.mark.parametrize(("module", "decompositions"), [(Composite, 0), (InPlace, 1), (Moved, 1)])
def test_decompositions_run_only_if_needed(
    module: Callable[[], nn.Module], decompositions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def count(program: Any, table: Any, **options: Any) -> Any:
        made.append(program)
        return decompose(program, table, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", count)
    traced = module().eval()
    model = trace(traced, SPEC, (torch.rand(2, 4, 6),))
    assert torch.export.ExportedProgram.run_decompositions is count
    assert len(made) == decompositions
    write(model, tmp_path / "g.onnx", lambda _: "g.weights")
    x = torch.rand(3, 4, 5)
    assert largest_error(open_session(tmp_path / "g.onnx"), (x,), (traced(x),)) <= 1e-6


class Mixed(nn.Module):
    """Operators on one type, between others on two, which need casts."""

    def forward(self, values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        halves = torch.sin(counts[:, None] / 2)
        return torch.where(values > counts[:, None], torch.sin(values * counts[:, None]), halves + 1)


def mixed_inputs(count: int) -> tuple[torch.Tensor, ...]:
    return 3 * torch.randn((count, 4), generator=torch.Generator().manual_seed(count)), torch.arange(count)


@pytest.fixture
def torchs_words() -> Iterator[list[str]]:
    """What torch logs of its exports."""
    handler, told = logging.Handler(), list[str]()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch.onnx").addHandler(handler)
    yield told
    logging.getLogger("torch.onnx").removeHandler(handler)


def test_an_export_is_silent(torchs_words: list[str], recwarn: pytest.WarningsRecorder) -> None:
    """Without torchvision torch names four of its operators at each export."""
    trace(InPlace().eval(), SPEC, (torch.rand(2, 4, 6),))
    assert torchs_words == []
    assert [str(warning.message) for warning in recwarn] == []


def test_only_operators_that_need_casts_are_computed_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Any] = []
    call = torch.fx.Interpreter.call_function
    monkeypatch.setattr(torch.fx.Interpreter, "call_function", lambda *given: computed.append(given[1]) or call(*given))
    spec = GraphSpec("g", (Input("values", ("n", 4)), Input("counts", ("n",))), (("y", ("n", 4)),))
    model = trace(Mixed().eval(), spec, mixed_inputs(3))
    assert torch.ops.aten.mul.Tensor in computed
    assert torch.ops.aten.sin.default not in computed
    write(model, tmp_path / "g.onnx", lambda _: "g.weights")
    session = open_session(tmp_path / "g.onnx")
    for count in (3, 5):
        assert largest_error(session, mixed_inputs(count), (Mixed()(*mixed_inputs(count)),)) <= 1e-6
