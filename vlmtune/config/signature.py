"""What a class or a function accepts."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Signature:
    """The arguments that a config may give.

    Attributes:
        shown: the name for messages.
        names: every argument that can be given by name.
        required: those without a default.
        required_by_name: those among them that nobody can give by position.
        open: it takes arguments of any name.
        hints: the annotations of the arguments, of functions and classes of ours; others may mean them loosely.
        nested: for arguments annotated with a dataclass or a TypedDict, the keys that these know.
    """

    shown: str
    is_class: bool
    names: tuple[str, ...]
    required: tuple[str, ...]
    required_by_name: tuple[str, ...]
    open: bool
    hints: dict[str, Any]
    nested: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, target: Callable[..., Any]) -> 'Signature | None':
        """None where Python cannot tell, as for some classes written in C."""
        layers = list(_layers(target))
        if not layers:
            return None
        hints = _hints(target)
        by_name = [[parameter for parameter in layer if parameter.kind in _BY_NAME] for layer in layers]
        required = [parameter for parameter in by_name[0] if parameter.default is inspect.Parameter.empty]
        return cls(
            shown=getattr(target, '__qualname__', repr(target)),
            is_class=inspect.isclass(target),
            names=tuple(dict.fromkeys(parameter.name for layer in by_name for parameter in layer)),
            required=tuple(parameter.name for parameter in required),
            required_by_name=tuple(p.name for p in required if p.kind is inspect.Parameter.KEYWORD_ONLY),
            open=_takes_any(layers[-1]),
            hints=hints if str(getattr(target, '__module__', '')).startswith('vlmtune.') else {},
            nested=_nested_keys(hints),
        )


def _layers(target: Callable[..., Any]) -> Iterator[list[inspect.Parameter]]:
    """The parameters; of a class those of every ``__init__`` on the way up while ``**kwargs`` hand on to the next."""
    functions: list[Callable[..., Any]] = [target]
    if inspect.isclass(target):
        chain = [vars(base)['__init__'] for base in target.__mro__ if base is not object and '__init__' in vars(base)]
        functions = chain or functions
    for function in functions:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return
        yield parameters[1:] if function is not target else parameters  # without self
        if not _takes_any(parameters):
            return


def _takes_any(parameters: list[inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def _nested_keys(hints: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    nested = {}
    for name, hint in hints.items():
        for option in typing.get_args(hint) or (hint,):
            if dataclasses.is_dataclass(option):
                nested[name] = tuple(item.name for item in dataclasses.fields(option) if item.init)
            elif typing.is_typeddict(option):
                nested[name] = tuple(typing.get_type_hints(option))
    return nested
