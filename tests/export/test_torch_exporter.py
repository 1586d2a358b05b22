"""Graphs without torch's decompositions: when they are left out, and that results are those of torch."""

from collections.abc import Callable
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
