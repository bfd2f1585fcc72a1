"""Looks through a pickle without running it: what it names, what it would call, and how much it would build.

``torch.load(weights_only=True)`` calls a few dozen functions that a file may combine as it likes, some of which build
something huge out of nothing (``bytearray(10**11)``, a chain of encodings, a tuple of tuples of tuples). Files that
torch.save wrote have no need of that. This machine follows the same instructions over what stands for the values, and
refuses whatever such files do not do.
"""

import mmap
import pickletools
from collections.abc import Callable, Collection
from io import BytesIO
from typing import Any, NamedTuple, TypeAlias

from vlmtune.utils.errors import CheckpointError, first_line

Readable: TypeAlias = BytesIO | mmap.mmap

_MOST_IN_TUPLE = 100_000  # with all tuples inside: what has to be walked through to hash it
_CONSTANTS = frozenset('NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING'.split())
_EMPTY = {'EMPTY_LIST': 'list', 'EMPTY_DICT': 'dict', 'EMPTY_SET': 'set'}
_TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_RENAMED = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}  # of Python 2, which the protocol of torch.save writes


class Storage(NamedTuple):
    """A piece of memory that a pickle asks for; ``kind`` is a class of torch, for example 'torch.FloatStorage'."""

    kind: str
    values: int


class Rules(NamedTuple):
    """What a pickle may do.

    Attributes:
        callable: names that it may call with any arguments.
        buildable: those whose results it may give a state.
        other: names that it may mention.
    """

    callable: Collection[str]
    buildable: Collection[str]
    other: Collection[str]


class _Name(NamedTuple):
    text: str


class _Tuple(NamedTuple):
    items: tuple[Any, ...]
    weight: int


class _Made(NamedTuple):
    by: str


def scan_pickle(stream: Readable, *, rules: Rules) -> tuple[Any, list[Storage]]:
    """Follow one pickle to its end.

    Args:
        stream: stands at its beginning; afterwards behind its end.
        rules: what it may do.

    Returns:
        what stands for its value (plain constants are themselves), and the storages that it asks for.

    Raises:
        CheckpointError: it is broken, or does what files of torch.save do not do.
    """
    machine = _Machine(rules)
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            machine.step(opcode.name, argument)
        return machine.stack.pop(), machine.storages
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f'broken pickle ({first_line(error)})') from error


class _Machine:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Storage] = []
        self.steps: dict[str, Callable[[Any], None]] = {
            'GLOBAL': self._name, 'REDUCE': self._call, 'NEWOBJ': self._call, 'BUILD': self._build,
            'BINPERSID': self._storage, 'MARK': self._mark, 'TUPLE': lambda _: self._tuple(self._from_mark()),
            'APPEND': lambda _: self._drop(1), 'SETITEM': lambda _: self._drop(2),
            'APPENDS': lambda _: self._fill(), 'SETITEMS': lambda _: self._fill(),
            'BINPUT': self._put, 'LONG_BINPUT': self._put, 'BINGET': self._get, 'LONG_BINGET': self._get,
            'PROTO': lambda _: None, 'STOP': lambda _: None,
        }  # fmt: skip

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_Made(_EMPTY[name]))
        elif name in _TUPLES:
            self._tuple(self._pop(_TUPLES[name]))
        elif name in self.steps:
            self.steps[name](argument)
        else:
            raise CheckpointError(f'a pickle with {name}, which torch.save does not write')

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError('nothing on the stack')
        at = len(self.stack) - count
        items, self.stack[at:] = self.stack[at:], []
        return items

    def _drop(self, count: int) -> None:
        self._pop(count)
        if not isinstance(self.stack[-1], _Made):
            raise ValueError('items are put into what holds none')

    def _fill(self) -> None:
        self._from_mark()
        self._drop(0)

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _from_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def _get(self, number: int) -> None:
        self.stack.append(self.memo[number])

    def _tuple(self, items: list[Any]) -> None:
        weight = 1 + sum(item.weight if isinstance(item, _Tuple) else 1 for item in items)
        if weight > _MOST_IN_TUPLE:
            raise CheckpointError(f'a pickle with a tuple of more than {_MOST_IN_TUPLE:,} values')
        self.stack.append(_Tuple(tuple(items), weight))

    def _name(self, argument: str) -> None:
        module, _, name = argument.partition(' ')
        full = f'{_RENAMED.get(module, module)}.{name}'
        if not any(full in known for known in self.rules):
            raise CheckpointError(f'a pickle that names {full[:120]}')
        self.stack.append(_Name(full))

    def _call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        name = function.text if isinstance(function, _Name) else None
        if not isinstance(arguments, _Tuple) or name is None:
            raise ValueError('a call of what is no function')
        if name == '_codecs.encode':  # so are bytes written; over again, with another encoding, they would grow
            text, *encoding = arguments.items
            if not isinstance(text, str) or encoding != ['latin1']:
                raise CheckpointError('a pickle that encodes more than text')
        elif name not in self.rules.callable:
            raise CheckpointError(f'a pickle that calls {name}')
        self.stack.append(_Made(name))

    def _build(self, _: Any) -> None:
        self._pop(1)
        made = self.stack[-1]
        if not isinstance(made, _Made) or made.by not in self.rules.buildable:
            raise CheckpointError(f'a pickle that changes {made.by if isinstance(made, _Made) else "a value"}')

    def _storage(self, _: Any) -> None:
        (identity,) = self._pop(1)
        if (
            not isinstance(identity, _Tuple)
            or len(identity.items) < 5
            or identity.items[0] not in ('storage', b'storage')
        ):
            raise ValueError('a persistent value that is no storage')
        kind, count = identity.items[1], identity.items[4]
        if not isinstance(kind, _Name) or not isinstance(count, int) or count < 0:
            raise ValueError('a storage without kind or size')
        self.storages.append(Storage(kind.text, count))
        self.stack.append(_Made('storage'))
