"""Runs chat templates, which are programs of a stranger, with bounds on what they may compute and build.

Jinja's sandbox keeps a template away from Python. It does not keep it from ending late or never: three nested loops
over ``range(100000)``, ``{{ 'x' * 10**11 }}``, a text that is doubled forty times, a list of lists of lists that
prints. Here every loop, call, filter and operator pays for what it looks at and makes, out of an allowance that grows
with the conversation. The same template and messages always end the same way, on any machine.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

_STEPS = 500_000  # of loops, and items that filters look at
_CHARACTERS = 16_000_000  # made, with all that is thrown away
_PER_CHARACTER = 100  # of the conversation, on top of both
_LARGEST_NUMBER = 10**18
_LARGEST_EXPONENT = 1000
_LONGEST_TEMPLATE = 1_000_000  # characters
_WIDE = re.compile(r'\d{5}')  # a width in a format
_NOT_OFFERED = ('center', 'wordwrap', 'urlize', 'xmlattr', 'pprint', 'sum', 'random')  # no chat template uses them


class _Costly(NodeTransformer):
    """Writes into a parsed template what pays for loops, lists and joined texts."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """The node with what pays for it; what is inside comes first."""
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            size = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_through('__pass', nodes.Const(size)), lineno=node.lineno))
            if isinstance(node, nodes.For):
                node.iter = _through('__items', node.iter)
        elif isinstance(node, nodes.Concat):
            return _through('__join', nodes.List(node.nodes))
        elif isinstance(node, nodes.Add):
            left: Any = node.left
            summands = left.node.items if getattr(left, 'name', None) == '__add' else [left]
            return _through('__add', nodes.List([*summands, node.right]))
        elif isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == 'load'):
            return _through('__weigh', node)
        return node


def _through(name: str, node: Any) -> nodes.Filter:
    """As a filter, because those are called without a detour."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Transformers' environment of chat templates, in which all that can grow is counted."""

    intercepted_binops = frozenset({'*', '**', '%'})

    def __init__(self) -> None:
        theirs = _compile_jinja_template('').environment
        extensions = [type(extension) for extension in theirs.extensions.values()]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._shown)
        self.filters = {n: self._bounded(f, n) for n, f in theirs.filters.items() if n not in _NOT_OFFERED}
        own = dict(__pass=self._pass, __items=self._items, __join=self._join, __add=self._add, __weigh=self._weighing)
        self.filters.update(own)
        self.globals.update({name: value for name, value in theirs.globals.items() if name != 'lipsum'})
        self.globals.pop('lipsum', None)
        self.allow(0)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return BoundedEnvironment, ()

    def allow(self, characters: int) -> None:
        """A new allowance, for a conversation of so many characters."""
        self._steps = _STEPS + _PER_CHARACTER * characters
        self._characters = _CHARACTERS + _PER_CHARACTER * characters
        self._weights: dict[int, int] = {}
        self._weighed: list[Any] = []  # so that no id is used twice

    def compile_bounded(self, source: str) -> Any:
        """A template whose every loop pays.

        Raises:
            TemplateError: it is broken, too long, nested too deep, or computes too much while it is compiled.
        """
        if len(source) > _LONGEST_TEMPLATE:
            raise TemplateError(f'it has {len(source):,} characters, expected {_LONGEST_TEMPLATE:,} at most')
        self.allow(len(source))
        try:
            tree = _Costly().visit(self.parse(source))
            return self.template_class.from_code(self, self.compile(tree), dict(self.globals), None)
        except (RecursionError, MemoryError, ValueError, SyntaxError, OverflowError, AttributeError) as error:
            raise TemplateError(f'it cannot be compiled: {type(error).__name__}') from error

    # ---- what is paid. Filters that take the context are never run while a template is compiled, which would pay once.

    def _spend(self, *, steps: int = 1, characters: int = 0) -> None:
        self._steps -= steps
        self._characters -= characters
        if self._steps < 0 or self._characters < 0:
            raise SecurityError('it computes or writes more than a conversation of this length needs')

    @pass_context
    def _pass(self, _: Context, size: int) -> None:
        """One time through the body of a loop or macro, which writes ``size`` characters of its own."""
        self._steps -= 1
        self._characters -= size
        if self._steps < 0 or self._characters < 0:
            self._spend()

    @pass_context
    def _items(self, _: Context, iterable: Any) -> Any:
        """What a loop goes over."""
        self._spend(steps=_length(iterable))
        return iterable

    @pass_context
    def _join(self, _: Context, parts: list[Any]) -> str:
        """The operator ``~``."""
        return self.concat([str(self.weigh(part)) for part in parts])

    @pass_context
    def _add(self, _: Context, parts: list[Any]) -> Any:
        """The operator ``+``, several times."""
        if all(type(part) is str for part in parts):
            return self.concat(parts)
        total = parts[0]
        for part in parts[1:]:
            if isinstance(total, str) and isinstance(part, str):
                self._spend(characters=len(total) + len(part))
            elif isinstance(total, list | tuple):
                self._spend(characters=len(total) + _size(part))
            elif max(abs(_number(total)), abs(_number(part))) > _LARGEST_NUMBER:
                raise SecurityError('it computes with numbers of more than 18 digits')
            total = total + part
        return self.weigh(total) if isinstance(total, list | tuple) else total

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what a template, a macro or a block wrote."""
        made = list(pieces)
        self._spend(characters=sum(map(len, made)))
        return ''.join(made)

    @pass_context
    def _weighing(self, _: Context, value: Any) -> Any:
        """A list, a tuple or a dict, just made."""
        return self.weigh(value)

    def weigh(self, value: Any) -> Any:
        """Pay for a value; a container weighs as much as all that it would print."""
        self._spend(characters=self._weight(value))
        return value

    def _weight(self, value: Any) -> int:
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, list | tuple | dict | Mapping):
            return 1
        if id(value) not in self._weights:
            items = [*value, *value.values()] if isinstance(value, Mapping) else value
            self._spend(steps=len(items))
            self._weights[id(value)] = 1 + sum(map(self._weight, items))
            self._weighed.append(value)
        return self._weights[id(value)]

    def _shown(self, value: Any) -> Any:
        return self.weigh(value) if isinstance(value, list | tuple | dict) else value

    # ---- operators, calls, filters

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``*``, ``**`` and ``%``; what would be too large is not made."""
        if operator == '*' and (_size(left) or _size(right)):
            self._spend(characters=max(_size(left), 1) * max(_size(right), 1) * max(_number(left), _number(right), 1))
        elif operator == '%' and isinstance(left, str):
            self._check_format(left, [right])
        elif max(abs(_number(left)), abs(_number(right))) > (
            _LARGEST_EXPONENT if operator == '**' else _LARGEST_NUMBER
        ):
            raise SecurityError('it computes with numbers of more than 18 digits')
        result = super().call_binop(context, operator, left, right)
        return self.weigh(result) if isinstance(result, list | tuple) else result

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a method or macro."""
        if isinstance(function, Macro):  # its body pays
            return super().call(context, function, *args, **kwargs)
        owner = getattr(getattr(function, '__wrapped__', function), '__self__', None)
        if isinstance(owner, str):
            self._check_text_call(str(getattr(function, '__name__', '')), owner, args, kwargs)
        self._spend()
        return self._paid(super().call(context, function, *args, **kwargs))

    def _paid(self, result: Any) -> Any:
        if isinstance(result, str | list | tuple | dict):
            self.weigh(result)
        return result

    def _check_text_call(self, name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        if name in ('format', 'format_map'):
            self._check_format(text, given)
        elif name == 'join' and given and isinstance(given[0], list | tuple):
            self._spend(characters=self._weight(given[0]) + len(text) * len(given[0]))
        elif name == 'replace' and len(given) >= 2:
            self._pay_for_replacing(text, *given[:2])
        elif name in ('center', 'ljust', 'rjust', 'zfill', 'expandtabs'):
            widest = max((_number(value) for value in given), default=0)
            self._spend(characters=max(widest, 0) * (1 + text.count('\t')))
        self._spend(steps=1 + len(text) // 1000)

    def _pay_for_replacing(self, text: str, old: Any, new: Any) -> None:
        times = text.count(str(old)) if str(old) else len(text) + 1
        self._spend(characters=len(text) + times * len(str(new)))

    def _check_format(self, text: str, values: Iterable[Any]) -> None:
        if _WIDE.search(text) or any(abs(_number(value)) > 10**4 for value in values if '*' in text or '{:{' in text):
            raise SecurityError('it formats with a width of more than four digits')
        self._spend(characters=len(text) + sum(map(self._weight, values)))

    def _bounded(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs and isinstance(args[0], str):
                self._spend(characters=2 * len(args[0]))
                return self._paid(function(*args))
            values = [a for a in args if not isinstance(a, Context | EvalContext | BoundedEnvironment)]
            given = [*values, *kwargs.values()]
            self._spend(steps=1 + sum(map(_length, given)))
            if any(_number(value) > 10**5 for value in given[1:]):
                raise SecurityError(f'it gives {name} a number of more than five digits')
            for value in given:
                self.weigh(value)  # filters print and join what they get
            if name == 'replace' and len(values) >= 3:
                self._pay_for_replacing(str(values[0]), values[1], values[2])
            elif name in ('join', 'indent', 'tojson'):
                filler = max((_size(v) or _number(v) for v in given[1:]), default=0)
                self._spend(characters=max(filler, 0) * (1 + _lines(given[0])))
            elif name == 'format':
                self._check_format(str(values[0]), given[1:])
            return self._paid(function(*args, **kwargs))

        return bounded


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple | dict | str | range) else 1


def _size(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple | str) else 0


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _lines(value: Any) -> int:
    return value.count('\n') if isinstance(value, str) else _length(value)
