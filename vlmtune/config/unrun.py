"""Configs that are read and never run: those of others and those in checkpoints may hold any code."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from vlmtune.utils.errors import ConfigError, UserError

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_LARGEST, _LONGEST = 1e15, 10_000  # of what is calculated: numbers, characters


class Name(str):
    """What an expression is that is no plain value: the text of it, such as ``PROMPT_TEMPLATE.vicuna``."""

    __slots__ = ()

    @property
    def last(self) -> str:
        """Behind the last dot."""
        return self.rpartition('.')[2]


def assignments(
    text: str | bytes, *, name: str, error: Callable[[str], UserError] = ConfigError
) -> list[tuple[str, ast.expr]]:
    """Names and right sides of the assignments at the top of a config, in their order.

    Args:
        text: of the config.
        name: of its file, for messages.
        error: class to raise.

    Raises:
        UserError: it is no Python; of the class ``error``.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as failure:
        raise error(f'{name} is no Python file: {failure}') from failure
    found = [node for node in body if isinstance(node, ast.Assign)]
    return [(node.targets[0].id, node.value) for node in found if isinstance(node.targets[0], ast.Name)]


def read_unrun(text: str | bytes, *, name: str, error: Callable[[str], UserError] = ConfigError) -> dict[str, Any]:
    """The settings of a config as plain data: tuples are lists, and what is no plain value is a ``Name``.

    Args:
        text, name, error: as of ``assignments``.

    Raises:
        UserError: it is no Python, or nested too deeply.
    """
    found: dict[str, Any] = {}
    try:
        for setting, node in assignments(text, name=name, error=error):
            found[setting] = value_of(node, found)
    except RecursionError as failure:
        raise error(f'{name} is nested too deeply to be a config') from failure
    return found


def value_of(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of one expression; ``known`` are those of the names before it."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.List() | ast.Tuple():
            return [value_of(item, known) for item in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {key.value: value_of(value, known) for key, value in pairs if isinstance(key, ast.Constant)}
        case ast.Call(func=ast.Name(id='dict'), args=[]):
            return {keyword.arg: value_of(keyword.value, known) for keyword in node.keywords if keyword.arg}
    try:
        return _calculated(node, known)
    except (ArithmeticError, ValueError):
        return Name(ast.unparse(node))


def _calculated(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.UnaryOp(op=ast.USub()):
            if isinstance(number := value_of(node.operand, known), int | float):
                return -number
        case ast.Call(func=ast.Name(id='int'), args=[only], keywords=[]):
            return int(_number(value_of(only, known)))
        case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=2)):
            return _number(value_of(node.left, known)) ** 2
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = value_of(node.left, known), value_of(node.right, known)
            if isinstance(node.op, ast.Add) and type(left) is str:
                return _text(left) + _text(right)
            return _OPERATORS[type(node.op)](_number(left), _number(right))
        case ast.JoinedStr():
            return ''.join(_text(value_of(part, known)) for part in node.values)
        case ast.FormattedValue(conversion=-1, format_spec=None):
            value = value_of(node.value, known)
            return value if type(value) is str else str(_number(value))
    raise ValueError


def _number(value: Any) -> Any:
    if isinstance(value, int | float) and abs(value) <= _LARGEST:
        return value
    raise ValueError


def _text(value: Any) -> str:
    if type(value) is str and len(value) <= _LONGEST:
        return value
    raise ValueError
