"""Mutants of a Python file: the file with one small mistake each, of the kind a person makes.

Operators and comparisons are exchanged, signs flipped, constants changed, conditions negated, arguments swapped or
left out, calls that bound or detach dropped, statements removed. Annotations, docstrings, assertions, decorators and
messages of errors are left alone.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
TWINS = (
    ("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("amin", "amax"), ("any", "all"),
    ("zeros_like", "ones_like"), ("sum", "mean"), ("exp", "log"), ("sqrt", "rsqrt"),
)  # fmt: skip
NAMES = {name: other for pair in TWINS for name, other in (pair, pair[::-1])}
SYMMETRIC = {"min", "max", "minimum", "maximum"}
"""Functions that do not care for the order of their arguments."""
DROPPED = {"detach", "clamp", "masked_fill", "abs", "square", "sqrt", "rsqrt", "exp", "mean", "flatten"}
"""Methods without which an expression still runs."""


@dataclass(frozen=True, eq=False)
class Mutant:
    """A file with one mistake."""

    line: int
    function: str
    """The function it is in; empty outside of all."""
    change: str
    """What stands there, and what stands there now."""
    code: CodeType


def mutants(source: str, name: str) -> Iterator[Mutant]:
    """Every mutant of a file's source; `name` is where the file lies."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]  # outer before inner
    owners = {id(inner): function.name for function in functions for inner in ast.walk(function)}
    for holder, place in _places(tree):
        original = _get(holder, place)
        for replacement in _replacements(original, holder):
            change = f"{_shown(original)} -> {_shown(replacement)}"
            _put(holder, place, replacement)
            code = compile(ast.fix_missing_locations(tree), name, "exec")
            _put(holder, place, original)
            yield Mutant(original.lineno, owners.get(id(original), ""), change, code)


Place = tuple[str, int | None]
"""A field of a syntax node, and where in it if it is a list."""


def _places(node: ast.AST) -> Iterator[tuple[ast.AST, Place]]:
    """Where expressions and statements stand that may be mutated: outer before inner, in the order of the file."""
    if isinstance(node, ast.Assert | ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        many = isinstance(value, list)
        for index, child in enumerate(value if many else [value]):
            if not isinstance(child, ast.AST) or _is_no_behaviour(child, node):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                yield node, (name, index if many else None)
            yield from _places(child)


def _is_no_behaviour(child: ast.AST, holder: ast.AST) -> bool:
    """Whether this is a docstring, or a type given a name."""
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True
    return isinstance(holder, ast.Module) and isinstance(child, ast.Assign) and isinstance(child.value, ast.Subscript)


def _get(holder: ast.AST, place: Place) -> Any:
    name, index = place
    value = getattr(holder, name)
    return value if index is None else value[index]


def _put(holder: ast.AST, place: Place, node: ast.AST) -> None:
    name, index = place
    if index is None:
        setattr(holder, name, node)
    else:
        getattr(holder, name)[index] = node


def _replacements(node: ast.AST, holder: ast.AST) -> Iterator[ast.AST]:
    """The mistakes that one can make where `node` stands."""
    if isinstance(holder, ast.If | ast.While) and node is holder.test:
        yield ast.UnaryOp(ast.Not(), node)
    match node:
        case ast.BinOp():
            yield from _binary(node)
        case ast.UnaryOp():
            yield node.operand
        case ast.Compare():
            yield from _compared(node)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.IfExp():
            yield ast.IfExp(node.test, node.orelse, node.body)
        case ast.Constant():
            yield from _constant(node)
        case ast.Call():
            yield from _called(node)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Assign(targets=[ast.Attribute(), *_]):
            yield from _statement(node)


def _binary(node: ast.BinOp) -> Iterator[ast.AST]:
    if other := OPERATORS.get(type(node.op)):
        yield ast.BinOp(node.left, other(), node.right)
    if isinstance(node.op, ast.Sub | ast.Div):
        yield ast.BinOp(node.right, node.op, node.left)
    if isinstance(node.op, ast.Mult | ast.Div):
        yield ast.UnaryOp(ast.USub(), node)


def _compared(node: ast.Compare) -> Iterator[ast.AST]:
    for index, op in enumerate(node.ops):
        for other in COMPARISONS[type(op)]:
            yield ast.Compare(node.left, [*node.ops[:index], other(), *node.ops[index + 1 :]], node.comparators)


def _constant(node: ast.Constant) -> Iterator[ast.AST]:
    match node.value:
        case bool():
            yield ast.Constant(not node.value)
        case int():
            yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
        case float():
            yield ast.Constant(node.value + 1)
            if node.value:
                yield ast.UnaryOp(ast.USub(), node)
        case str():
            yield ast.Constant(node.value + "~")


def _called(node: ast.Call) -> Iterator[ast.AST]:
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for index in range(0 if function in SYMMETRIC else len(node.args) - 1):
        first, second = node.args[index : index + 2]
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            yield ast.Call(node.func, [*node.args[:index], second, first, *node.args[index + 2 :]], node.keywords)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg != "device":  # there is but one where these tests run
            yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])
    if twin := NAMES.get(function):
        called: ast.expr = ast.Name(twin, ast.Load())
        if isinstance(node.func, ast.Attribute):
            called = ast.Attribute(node.func.value, twin, ast.Load())
        yield ast.Call(called, node.args, node.keywords)
    if function in DROPPED and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "torch":
        yield node.func.value


def _statement(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.AugAssign) and (other := OPERATORS.get(type(node.op))):
        yield ast.AugAssign(node.target, other(), node.value)
    yield ast.Pass()


def _shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
