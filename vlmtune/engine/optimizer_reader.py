"""Finds any stretch of any parameter in the optimizer files that the ranks of a run have written."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmtune.utils.errors import CheckpointError

RESET_OPTION = '--reset-optimizer to go on with its weights and a fresh optimizer'


class FragmentRecord(NamedTuple):
    """A stretch of a flattened parameter and where it lies in its unit."""

    name: str  # of the parameter
    start: int  # in the flattened parameter
    numel: int
    offset: int  # in the flattened unit

    def tensor_name(self, key: str) -> str:
        """The name in the file of its values."""
        return f'{self.name}@{self.start}/{key}'


class UnitRecord(NamedTuple):
    """What a file says of a unit."""

    fragments: tuple[FragmentRecord, ...]
    by_weight: bool  # one value per weight, so that stretches can be taken
    keys: tuple[str, ...]  # of tensors
    numbers: dict[str, Any]  # state that is a number for all weights of the unit

    def tensor_name(self, key: str) -> str:
        """The name in the file of state that belongs to the unit as a whole."""
        return self.fragments[0].tensor_name(key)


class _Found(NamedTuple):
    """A saved stretch, and the file that holds its values."""

    fragment: FragmentRecord
    unit: UnitRecord
    file: Any

    @property
    def end(self) -> int:
        return self.fragment.start + self.fragment.numel


class SavedState(ExitStack):
    """What all ranks of a run wrote of their optimizers; values are read when they are asked for.

    Attributes:
        kind: name of the optimizer.
        groups: settings of its parameter groups.

    Args:
        directory: of a checkpoint.

    Raises:
        CheckpointError: there is no such state in it, or not as vlmtune writes it.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._found: dict[str, list[_Found]] = {}
        self._files: dict[str, Any] = {}  # by tensor name
        paths = sorted(directory.glob('optimizer_*.safetensors'))
        if not paths:
            raise CheckpointError(f'{directory} holds no state of an optimizer; use {RESET_OPTION}')
        contents = [self._open(path) for path in paths]
        self.kind, self.groups = str(contents[0]['optimizer']), list(contents[0]['groups'])
        for stretches in self._found.values():
            stretches.sort(key=lambda found: found.fragment.start)

    def _open(self, path: Path) -> dict[str, Any]:
        try:
            file = self.enter_context(safe_open(path, framework='pt'))
            content = json.loads((file.metadata() or {})['optimizer'])
            units = [_unit(entry) for entry in content['units']]
            self._files.update(dict.fromkeys(file.keys(), file))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f'{path} is not the state of an optimizer as vlmtune writes it ({type(error).__name__}: {error})'
            ) from error
        for unit in units:
            for fragment in unit.fragments:
                self._found.setdefault(fragment.name, []).append(_Found(fragment, unit, file))
        return content

    def check_parameters(self, names: set[str]) -> None:
        """Compare the parameters that were saved with those of this rank.

        Raises:
            CheckpointError: one is missing.
        """
        missing = sorted(names - set(self._found))
        if missing:
            raise CheckpointError(
                f'{self._directory} holds no optimizer state of {len(missing)} tensors that train here '
                f'(first: {missing[0]}); use the config that made it, or {RESET_OPTION}'
            )

    def record_for(self, fragments: Sequence[FragmentRecord]) -> UnitRecord:
        """What the state of a unit with these fragments consists of.

        Raises:
            CheckpointError: it was saved in units of which this one cannot be made.
        """
        units = [found.unit for fragment in fragments for found in self._touching(fragment)]
        first = units[0]
        for unit in units:
            if (unit.by_weight, unit.keys, unit.numbers) != (first.by_weight, first.keys, first.numbers):
                raise self._layout_error(fragments, 'parts of it have states of different kinds')
            if not unit.by_weight and unit.fragments != tuple(fragments):
                raise self._layout_error(fragments, f'{", ".join(unit.keys)} cannot be cut into other pieces')
        return first

    def _layout_error(self, fragments: Sequence[FragmentRecord], why: str) -> CheckpointError:
        return CheckpointError(
            f'{self._directory}: the state of {self.kind} for {fragments[0].name} fits only the strategy and number of '
            f'processes that saved it ({why}); resume with those, or use {RESET_OPTION}'
        )

    def _touching(self, fragment: FragmentRecord) -> list[_Found]:
        """The saved stretches that hold a fragment, without a gap.

        Raises:
            CheckpointError: a part of it is not there.
        """
        end, at, touching = fragment.start + fragment.numel, fragment.start, []
        for found in self._found[fragment.name]:
            if found.fragment.start <= at < found.end and at < end:
                touching.append(found)
                at = found.end
        if at < end:
            raise CheckpointError(
                f'{self._directory} lacks the optimizer state of {fragment.name} from weight {at} to {end}; '
                f'a file of another rank is missing; use {RESET_OPTION}'
            )
        return touching

    def tensor(self, name: str) -> Tensor:
        """State that belongs to a unit as a whole."""
        return self._files[name].get_tensor(name)

    def stretches(self, key: str, fragments: Iterable[FragmentRecord], *, numel: int) -> Tensor:
        """State with one value per weight, as one flat tensor [numel] with fragments where they lie, else zeros."""
        flat: Tensor | None = None
        for fragment in fragments:
            end = fragment.start + fragment.numel
            for found in self._touching(fragment):
                saved = found.file.get_slice(found.fragment.tensor_name(key))
                first, last = max(found.fragment.start, fragment.start), min(found.end, end)
                values = saved[first - found.fragment.start : last - found.fragment.start]
                flat = torch.zeros(numel, dtype=values.dtype) if flat is None else flat
                flat[fragment.offset + first - fragment.start :][: last - first] = values
        assert flat is not None
        return flat


def _unit(entry: dict[str, Any]) -> UnitRecord:
    fragments = tuple(FragmentRecord(str(name), *map(int, rest)) for name, *rest in entry['fragments'])
    return UnitRecord(fragments, bool(entry['by_weight']), tuple(entry['keys']), dict(entry['numbers']))
