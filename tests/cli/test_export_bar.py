"""The bar of `export`."""

from typing import Any

import pytest
from sparsectrl_lcm.cli import run
from sparsectrl_lcm.cli.progress_bar import Bar
from sparsectrl_lcm.export import exporter
from sparsectrl_lcm.export.check import ExportError


def test_it_counts_to_the_number_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, float]] = []

    def export_bundle(_: Any, __: Any, on_graph: exporter.OnGraph, *___: Any) -> None:
        for name, index in (("unet", 0), ("vae", 1), ("done", 2)):
            on_graph(name, index, 2)
        raise ExportError("export", "no bundle is needed")

    monkeypatch.setattr(exporter, "export_bundle", export_bundle)
    monkeypatch.setattr(Bar, "update", lambda _, *update: shown.append(update))
    assert run(["export", "--base", "a", "--motion-adapter", "b", "-o", "c"]) == 2
    assert shown == [("unet (1/2)", 0.0), ("vae (2/2)", 0.5), ("done (2/2)", 1.0)]
