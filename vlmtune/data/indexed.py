"""Sequences whose items are made when they are asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar('T')


class Indexed(Sequence[T]):
    """A sequence by ``at`` and ``__len__`` alone: negative indices, slices (lists) and IndexError come with it."""

    @abstractmethod
    def at(self, index: int) -> T:
        """One item; ``index`` is 0 to ``len(self) - 1``."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))
        return [self.at(place) for place in places[index]] if isinstance(index, slice) else self.at(places[index])
