"""The optimizer's state in files: one format for one process, DDP and every stage of ZeRO.

A *unit* is a tensor that the optimizer updates: a parameter, or under ZeRO a flat partition with fragments of several.
State with one value per weight (moments) is written by fragment, under ``<parameter>@<start in the flattened
parameter>/<key>``: another number of ranks, stage or strategy finds the slices that it needs, bit for bit. State of
another shape (the scales of 8-bit optimizers, Adafactor's rows) is written as it is and fits the same unit only.
Numbers (``step``) and the settings of parameter groups are JSON in the metadata. ``optimizer_reader.py`` reads.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from vlmtune.engine.optimizer_reader import RESET_OPTION, FragmentRecord, SavedState, UnitRecord
from vlmtune.models import SupervisedFinetune
from vlmtune.utils.disk import Written
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.tensor_file import layout_of, write_tensors

_NOT_OF_THE_RUN = ('params', 'name', 'foreach', 'fused', 'capturable', 'differentiable')  # names, and how it computes


class Unit(NamedTuple):
    """A tensor that the optimizer updates, and what of which parameters it holds; the rest of it is padding."""

    tensor: Tensor
    fragments: tuple[FragmentRecord, ...]


def optimizer_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f'optimizer_{rank}.safetensors'


def whole_units(model: SupervisedFinetune) -> list[Unit]:
    """One unit per trained parameter, for optimizers that update the parameters themselves."""
    return [
        Unit(parameter, (FragmentRecord(name, start=0, numel=parameter.numel(), offset=0),))
        for name, parameter in model.named_trainable().items()
    ]


# ---- writing


def save_optimizer_state(path: Path, optimizer: Optimizer, *, units: Sequence[Unit]) -> Written:
    """Write the state of an optimizer over ``units``.

    Raises:
        OSError: it could not be written.
        CheckpointError: the state holds something that is neither a tensor nor a plain number.
    """
    units = [unit for unit in units if unit.fragments]
    records = [_record(optimizer, unit) for unit in units]
    content = dict(optimizer=kind_of(optimizer), groups=_settings(optimizer), units=[r._asdict() for r in records])
    tensors = dict(
        item for unit, record in zip(units, records, strict=True) for item in _tensors(optimizer, unit, record)
    )
    layout = {name: layout_of(tensor) for name, tensor in tensors.items()}
    return write_tensors(path, tensors.items(), layout=layout, metadata=dict(optimizer=json.dumps(content)))


def _record(optimizer: Optimizer, unit: Unit) -> UnitRecord:
    state = optimizer.state.get(unit.tensor, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and not _is_number(key, value)}
    numbers = {key: _plain(value, key) for key, value in state.items() if key not in tensors}
    by_weight = all(value.shape == unit.tensor.shape for value in tensors.values())
    return UnitRecord(unit.fragments, by_weight=by_weight, keys=tuple(sorted(tensors)), numbers=numbers)


def _is_number(key: str, value: Tensor) -> bool:
    return value.ndim == 0 and (key == 'step' or value.numel() == 1)


def _plain(value: Any, key: str) -> Any:
    plain = value.item() if isinstance(value, Tensor) else value
    if not isinstance(plain, int | float | str | None):
        raise CheckpointError(f'the optimizer keeps {key} of type {type(value).__name__}, which no checkpoint can hold')
    return plain


def _tensors(optimizer: Optimizer, unit: Unit, record: UnitRecord) -> Iterator[tuple[str, Tensor]]:
    for key in record.keys:
        value = optimizer.state[unit.tensor][key].detach()
        if not record.by_weight:
            yield record.tensor_name(key), value
            continue
        for fragment in record.fragments:
            yield fragment.tensor_name(key), value.flatten().narrow(0, fragment.offset, fragment.numel)


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]


def kind_of(optimizer: Optimizer) -> str:
    """The name of the algorithm: DeepSpeed's Adams keep the same state as torch's."""
    name = type(optimizer).__name__
    if name in ('DeepSpeedCPUAdam', 'FusedAdam'):
        return 'AdamW' if getattr(optimizer, 'adam_w_mode', True) else 'Adam'
    return name


# ---- reading


def load_optimizer_state(directory: Path, optimizer: Optimizer, *, units: Sequence[Unit]) -> None:
    """Set the state of an optimizer over ``units`` from what all ranks of another run wrote.

    Nothing changes unless everything fits.

    Raises:
        CheckpointError: it is another optimizer's, over other parameters, or cannot be brought into these units.
    """
    with SavedState(directory) as saved:
        _check_same_optimizer(saved, optimizer, directory)
        saved.check_parameters({name for unit in units for name in (f.name for f in unit.fragments)})
        states = [(unit, _assemble(saved, unit, optimizer)) for unit in units]
    for unit, state in states:
        if state:
            optimizer.state[unit.tensor] = state
    _apply_settings(saved.groups, optimizer)


def _check_same_optimizer(saved: SavedState, optimizer: Optimizer, directory: Path) -> None:
    mine, theirs = _in_words(kind_of(optimizer), _settings(optimizer)), _in_words(saved.kind, saved.groups)
    if mine != theirs:
        raise CheckpointError(
            f'{directory} holds the state of {theirs}; this run has {mine}; '
            f'use the config that made it, or {RESET_OPTION}'
        )


def _in_words(kind: str, groups: Sequence[dict[str, Any]]) -> str:
    return f'{kind} over {", ".join(str(group.get("name", number)) for number, group in enumerate(groups))}'


def _assemble(saved: SavedState, unit: Unit, optimizer: Optimizer) -> dict[str, Any]:
    """The state of one unit; empty if it had none."""
    state: dict[str, Any] = {}
    if not unit.fragments:  # padding alone
        return state
    record = saved.record_for(unit.fragments)
    if not record.by_weight:
        for key in record.keys:
            state[key] = saved.tensor(record.tensor_name(key)).to(unit.tensor.device)
    else:
        for key in record.keys:
            flat = saved.stretches(key, unit.fragments, numel=unit.tensor.numel())
            state[key] = flat.view(unit.tensor.shape).to(unit.tensor.device)
    for key, value in record.numbers.items():
        state[key] = _number(key, value, optimizer=optimizer, device=unit.tensor.device)
    return state


def _number(key: str, value: Any, *, optimizer: Optimizer, device: torch.device) -> Any:
    """As the optimizer keeps it: torch's own count steps in a float32 tensor, the others in an int."""
    if key != 'step':
        return value
    if not type(optimizer).__module__.startswith('torch.optim'):
        return int(value)
    group = optimizer.param_groups[0]
    on_device = group.get('fused') or group.get('capturable')
    return torch.tensor(float(value), dtype=torch.float32, device=device if on_device else 'cpu')


def _apply_settings(saved: Sequence[dict[str, Any]], optimizer: Optimizer) -> None:
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        for key, value in settings.items():
            if key not in _NOT_OF_THE_RUN and (key in group or key == 'initial_lr'):
                group[key] = tuple(value) if isinstance(value, list) else value
