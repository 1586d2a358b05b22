"""Finds single changes of a Python source that a test should notice."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: the text `before`, from `line` and `column` on (bytes), becomes `after`.

    `first` and `last` are the lines of the statement; `function` tells whether it is inside a function.
    """

    file: str
    line: int
    column: int
    before: str
    after: str
    first: int
    last: int
    function: bool

    def apply(self, source: str) -> str:
        """Returns the changed source."""
        lines = source.encode().splitlines(keepends=True)
        start = sum(map(len, lines[: self.line - 1])) + self.column
        whole = b"".join(lines)
        before = self.before.encode()
        assert whole[start : start + len(before)] == before
        return (whole[:start] + self.after.encode() + whole[start + len(before) :]).decode()

    def compiles(self, source: str) -> bool:
        """Returns whether the changed source is Python."""
        try:
            compile(self.apply(source), self.file, "exec")
        except SyntaxError:
            return False
        return True


def find_mutants(file: str, source: str) -> list[Mutant]:
    """Returns the mutants of a source, those of messages, logs, annotations, decorators and docstrings left out."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return finder.found


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, source: str) -> None:
        self.file, self.source = file, source.encode()
        self.starts = [0, *accumulate(map(len, self.source.splitlines(keepends=True)))]
        """Of each line, in bytes."""
        self.found: list[Mutant] = []
        self.statement: ast.stmt | None = None
        self.functions = 0

    def visit(self, node: ast.AST) -> None:
        if _is_left_out(node):
            return
        if isinstance(node, ast.stmt):
            self.statement = node
        for place, changed in _changes(node):
            self._add(place, changed)
        if isinstance(node, ast.Raise):  # its message
            return
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            self.functions += inside and name == "body"
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    statement = self.statement
                    self.visit(child)
                    self.statement = statement
            self.functions -= inside and name == "body"

    def _add(self, node: Any, changed: ast.AST) -> None:
        start, end = (self.starts[line - 1] for line in (node.lineno, node.end_lineno))
        before = self.source[start + node.col_offset : end + node.end_col_offset].decode()
        after = ast.unparse(changed)
        if isinstance(changed, ast.expr):
            after = f"({after})"
        assert self.statement is not None
        body = getattr(self.statement, "body", None)
        last = self.statement.lineno if body else self.statement.end_lineno or 0
        if body:  # only its head, above its body
            last = max(last, body[0].lineno - 1)
        mutant = Mutant(
            self.file, node.lineno, node.col_offset, before, after, self.statement.lineno, last, self.functions > 0
        )
        self.found.append(mutant)


def _is_left_out(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()) | ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.pattern():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "warnings")))):
            return True
        case ast.Call(func=ast.Name(id="cast" | "TypeVar")):
            return True
    return False


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yields parts of a node and what they can become."""
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield test, ast.UnaryOp(ast.Not(), test)
        case ast.comprehension(ifs=conditions):
            yield from ((condition, ast.Constant(True)) for condition in conditions)
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield node, ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield node, ast.Pass()
        case ast.Break():
            yield node, ast.Continue()
        case ast.Continue():
            yield node, ast.Break()
        case ast.Call(keywords=keywords):
            for index in range(len(keywords)):
                yield node, _with(node, keywords=keywords[:index] + keywords[index + 1 :])
        case ast.Constant(value=value) if (other := _other(value)) is not None:
            yield node, ast.Constant(other)
        case _:
            yield from ((node, changed) for changed in _other_operator(node))


def _other(value: object) -> object:
    """Returns another constant of the same type; None for sentences, such as messages, and for what has no other."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 2 or 1.0
        case str() if value and not any(map(str.isspace, value)):
            return value + "X"
    return None


def _other_operator(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[operator, *rest]) if type(operator) in OPERATORS:
            yield _with(node, ops=[OPERATORS[type(operator)](), *rest])
        case ast.BoolOp(op=operator) | ast.BinOp(op=operator) if type(operator) in OPERATORS:
            yield _with(node, op=OPERATORS[type(operator)]())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand


def _with(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
