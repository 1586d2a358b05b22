"""Every TensorRT name in product code exists in every release that the code runs with."""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes.tensorrt_builds import RELEASES, TENSORRT, fake
from fakes.tensorrt_fakes import FakeModule

ROOT = Path(__file__).parent.parent.parent
PRODUCT = [
    *(
        f"engine/tensorrt/{name}.py"
        for name in ("builder", "configuration", "build_progress", "timing_cache", "layer_report", "kernels")
    ),
    *(f"runtime/format/{name}.py" for name in ("build_options", "engine_keys", "engine_sets", "weights")),
    "engine/rewrites/typed_graph.py",
    *(f"runtime/gpu/{name}.py" for name in ("tensorrt_library", "tensorrt", "cuda", "engine_interface")),
]


def ask_for_fp16(trt: Any) -> None:
    trt.new("IBuilderConfig").set_flag(trt.BuilderFlag.FP16)


def ask_for_the_old_size(trt: Any) -> None:
    assert trt.new("ICudaEngine").device_memory_size == 0


@pytest.mark.parametrize("use", [ask_for_fp16, ask_for_the_old_size])
def test_names_that_were_removed_fail(use: Callable[[Any], None]) -> None:
    use(fake("10.16"))
    for release in ("11.4", "rtx-1.7"):
        with pytest.raises(AttributeError, match=f"TensorRT {release} has no"):
            use(fake(release))


class Names(ast.NodeVisitor):
    """Finds the attribute chains of TensorRT's module in a file, such as `BuilderFlag.TF32`, and their backends.

    The module is `trt` or `<library>.module`. A function that is called for only one backend belongs to that backend.
    """

    BOTH = frozenset(RELEASES.values())

    def __init__(self, source: str) -> None:
        self._backends = self.BOTH
        self._function = ""
        self._aliases: dict[str, str] = {}
        self._used: list[tuple[str, frozenset[str], int, str]] = []
        self._called_for: dict[str, frozenset[str]] = {}
        self.visit(ast.parse(source))

    def found(self) -> Iterator[tuple[str, str, int]]:
        """Yields name, backend and line of each use."""
        for name, backends, line, function in self._used:
            for backend in backends & self._called_for.get(function, self.BOTH):
                yield name, backend, line

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._function = self._function, self._function or node.name
        self.generic_visit(node)
        self._function = outer

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def visit_For(self, node: ast.For) -> None:
        """A loop over compute capabilities belongs to tensorrt-rtx: only that backend has the option."""
        of_rtx = "compute_capabilities" in ast.unparse(node.iter)
        self._within(frozenset(("tensorrt-rtx",)) if of_rtx else self.BOTH, [node.iter, *node.body])

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name):
            name = node.func.id
            self._called_for[name] = self._called_for.get(name, frozenset()) | self._backends
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        name = self._name(node.value)
        if name and isinstance(node.targets[0], ast.Name):
            self._aliases[node.targets[0].id] = name
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._name(node):
            self._used.append((name, self._backends, node.lineno, self._function))
        else:
            self.generic_visit(node)

    def _branch(self, test: ast.expr, then: Sequence[ast.AST], otherwise: Sequence[ast.AST]) -> None:
        text = ast.unparse(test)
        about = re.search(r"(not )?(\w+\.)*(is_)?rtx\b", text)
        asked = frozenset(["tensorrt" if about[1] else "tensorrt-rtx"]) if about else frozenset[str]()
        self._within(self.BOTH, [test])
        self._within(asked or self.BOTH, then)
        self._within(self.BOTH - asked if about and about[0] == text else self.BOTH, otherwise)

    def _within(self, backends: frozenset[str], nodes: Sequence[ast.AST]) -> None:
        outer, self._backends = self._backends, self._backends & backends
        for node in nodes:
            self.visit(node)
        self._backends = outer

    def _name(self, node: ast.expr) -> str:
        """Returns `A.b` for `trt.A.b`, or an empty string if the expression is not a TensorRT name."""
        text = re.sub(r"^[\w.]*\.module(?=\.)", "trt", ast.unparse(node)) if isinstance(node, ast.Attribute) else ""
        first, _, rest = text.partition(".")
        if first in self._aliases:
            return f"{self._aliases[first]}.{rest}"
        return rest if first == "trt" and re.fullmatch(r"[\w.]+", rest) else ""


def has(trt: FakeModule, name: str) -> bool:
    try:
        operator.attrgetter(name)(trt)
    except AttributeError:
        return False
    return True


def missing(source: str) -> list[tuple[int, str, str]]:
    """Returns line, release and name of each use in a release that lacks the name."""
    fakes = {release: fake(release) for release in RELEASES}
    return [
        (line, release, name)
        for name, used_for, line in Names(source).found()
        for release, backend in RELEASES.items()
        if backend == used_for and not has(fakes[release], name)
    ]


def test_every_name_that_is_used_exists_in_every_release() -> None:
    sources = {path: (ROOT / path).read_text() for path in PRODUCT}
    assert {path: missing(source) for path, source in sources.items()} == {path: [] for path in PRODUCT}
    names = {name for source in sources.values() for name, _, _ in Names(source).found()}
    expected = {"BuilderFlag.REFIT_INDIVIDUAL", "ComputeCapability", "HardwareCompatibilityLevel.AMPERE_PLUS"}
    assert expected | {"IProgressMonitor", "Refitter", "Runtime"} <= names


def test_the_check_of_names_finds_what_is_wrong() -> None:
    source = """
def configure(trt, config, backend):
    config.set_flag(trt.BuilderFlag.FP16)
    if backend == "tensorrt-rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        only_rtx(trt)
    else:
        levels = trt.ComputeCapability
        config.level = levels.SM75

def only_rtx(trt):
    return trt.ComputeCapability

def both(self):
    return self.library.module.IRuntimeCache()
"""
    expected = {(3, "11.4", "BuilderFlag.FP16"), (3, "rtx-1.7", "BuilderFlag.FP16")}
    for release in TENSORRT:
        expected |= {(8, release, "ComputeCapability"), (9, release, "ComputeCapability.SM75")}
        expected |= {(15, release, "IRuntimeCache")}
    assert set(missing(source)) == expected
