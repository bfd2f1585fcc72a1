"""Names of weights in two layouts, the one of a checkpoint and ours, mapped both ways.

A pattern is a name with holes: ``{i}``, one letter, stands for a number; ``{rest}``, a word, for anything. The holes of
both sides of a rule are the same, so a rule reads from left to right as well as from right to left.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

_HOLE = re.compile(r'\{(\w+)\}')


def _alone(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


def _only(tensors: list[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


@dataclass(frozen=True)
class Rule:
    """One tensor of the original, which is one of ours or several.

    Attributes:
        original: its pattern.
        native: the patterns of ours, in the order of ``split`` and ``join``.
        split: tensor -> ours. It may be given a tensor on the meta device.
        join: ours -> tensor, the inverse of ``split``.
    """

    original: str
    native: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = _alone
    join: Callable[[list[Tensor]], Tensor] = _only


def rename(original: str, native: str) -> Rule:
    """The same tensor under another name."""
    return Rule(original, (native,))


class Match(NamedTuple):
    """What one tensor of the original is here: the rule, and the names of ours."""

    rule: Rule
    native: tuple[str, ...]


class NameMap:
    """Finds the rule of a name.

    Args:
        rules: the first one that fits a name is taken.
        kept: patterns of tensors of the original that have no place here.
    """

    def __init__(self, rules: Sequence[Rule], *, kept: Sequence[str] = ()) -> None:
        self._by_original = [(_compiled(rule.original), rule) for rule in rules]
        self._kept = [_compiled(pattern) for pattern in kept]

    def is_kept(self, original: str) -> bool:
        """Whether a tensor of the original is one that has no place here."""
        return any(pattern.fullmatch(original) for pattern in self._kept)

    def match(self, original: str) -> Match | None:
        """What a tensor of the original is here; None if no rule knows it."""
        for pattern, rule in self._by_original:
            if found := pattern.fullmatch(original):
                return Match(rule, tuple(native.format(**found.groupdict()) for native in rule.native))
        return None


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(''.join(_pieces(pattern)))


def _pieces(pattern: str) -> Iterator[str]:
    seen: set[str] = set()
    for place, piece in enumerate(_HOLE.split(pattern)):
        if place % 2 == 0:
            yield re.escape(piece)
        elif piece in seen:
            yield f'(?P={piece})'
        else:
            seen.add(piece)
            yield f'(?P<{piece}>{r"[0-9]+" if len(piece) == 1 else ".+"})'
