"""Starts a run from weights that another one left: ours, an adapter of PEFT, a Hugging Face model, a legacy ``.pth``.

The first rank reads, gives every weight its name here, and writes those that train into a file beside the checkpoints
to come; the strategy sets them from there on all ranks, as it does on resume. What is frozen here cannot be set: a
checkpoint holds what trains, so that a resume and an export would silently go back to the base model.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.engine import ranks
from vlmtune.engine.checkpoint import WEIGHTS_FILE
from vlmtune.engine.foreign_weights import ForeignWeights, Weights, open_source
from vlmtune.engine.optim import unwrap
from vlmtune.layouts import Weight
from vlmtune.models import SupervisedFinetune
from vlmtune.models.sharded import gathered, logical_shape
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.tensor_file import write_tensors

logger = logging.getLogger(__name__)

_STAGING = 'load_from.safetensors.tmp'
_NAMED = 3  # names that a message lists


def load_weights(runner: Any, path: str) -> str:
    """Set the weights that train from what ``path`` holds; every rank calls it.

    Parts of which it holds nothing keep the weights that they have; the line says which.

    Args:
        runner: a Runner whose strategy is prepared.
        path: a checkpoint of vlmtune, a PEFT adapter, a Hugging Face model, or a legacy checkpoint.

    Returns:
        A line for the log.

    Raises:
        CheckpointError: it cannot be read, or does not fit the model and its tuned parts.
        ModelError: a Hugging Face model, or a file of weights, cannot be read.
    """
    folder, model = Path(path).expanduser(), unwrap(runner.model)
    source: ForeignWeights | None = None
    with ranks.together(f'reading {path}'):
        if runner.rank == 0:
            source = open_source(folder, model=model)
            _check_places(source, model=model)
    kept = _parts_left(source, model=model) if source is not None else []
    _check_frozen(source, model=model, path=path)
    whole = source is not None and source.is_ours and not kept and set(source.weights) == set(model.named_trainable())
    if ranks.gather(whole, what=f'reading {path}')[0]:
        runner.strategy.load_trainable(folder / WEIGHTS_FILE)
    else:
        _load_through_file(runner, {} if source is None else source.weights)
    told = '' if source is None else source.remark
    return f'weights loaded from {path}{told}' + (f'; left as they were: {", ".join(kept)}' if kept else '')


def _load_through_file(runner: Any, weights: Weights) -> None:
    staging, strategy = Path(runner.work_dir, _STAGING), runner.strategy
    with ranks.together('writing the weights to start from'):
        state = strategy.trainable_state()
        try:
            if runner.rank == 0:
                staging.unlink(missing_ok=True)
                chosen = ((name, _float32(weights, name, tensor)) for name, tensor in state)
                write_tensors(staging, chosen, layout=strategy.trainable_layout())
        except OSError as error:
            raise CheckpointError(f'{staging} cannot be written: {error.strerror or error}') from error
        finally:
            for _ in state:  # the others gather along
                pass
    try:
        with ranks.together('setting the weights to start from'):
            strategy.load_trainable(staging)
    finally:
        if runner.rank == 0:
            staging.unlink(missing_ok=True)


def _float32(weights: Weights, name: str, now: Tensor) -> Tensor:
    return weights[name].read().to(torch.float32).contiguous() if name in weights else now


# ---- whether it fits


def _check_places(source: ForeignWeights, *, model: SupervisedFinetune) -> None:
    """Every weight has a place of its shape, and every part that the source holds is there as a whole."""
    if source.lost:
        raise CheckpointError(
            f'{source.path}: {len(source.lost)} of its tensors have no place in this run '
            f'({_first(source.lost)}); use the model and the tune settings that made it'
        )
    for name, parameter in model.model.named_parameters():
        weight, here = source.weights.get(name), tuple(logical_shape(parameter))
        if weight is not None and weight.shape != here:
            raise CheckpointError(f'{source.path}: {source.origins[name]} is {weight.shape}, {name} is {here} here')
    trained = model.named_trainable()
    given = {name for name in source.weights if name in trained}
    if not given:
        raise CheckpointError(
            f'{source.path} holds no weight of the parts that train here ({", ".join(_parts(trained, model))}); '
            'tune other parts, or set pretrained_model_name_or_path to it if it is a whole model'
        )
    begun = {model.part_of(name) for name in given}
    missing = sorted(name for name in trained if model.part_of(name) in begun and name not in given)
    if missing:
        raise CheckpointError(
            f'{source.path} lacks {len(missing)} of the tensors that train here ({_first(missing)}); '
            'use the tune settings that made it'
        )


def _parts_left(source: ForeignWeights, *, model: SupervisedFinetune) -> list[str]:
    return _parts([name for name in model.named_trainable() if name not in source.weights], model)


def _parts(names: Any, model: SupervisedFinetune) -> list[str]:
    return list(dict.fromkeys(model.part_of(name) for name in names))


def _check_frozen(source: ForeignWeights | None, *, model: SupervisedFinetune, path: str) -> None:
    """What is frozen here must be what the source holds; every rank comes, because weights may lie in pieces."""
    trained = model.named_trainable()
    mine = []
    for name in {} if source is None else source.weights:  # of a part that trains, what is left is never computed with
        if name not in trained and model.plans[model.part_of(name)].mode != 'full':
            mine.append(name)
    names: list[str] = ranks.gather(mine, what=f'reading {path}')[0]
    if not names:
        return
    parameters = dict(model.model.named_parameters())
    with ranks.together(f'comparing the frozen weights with {path}'):
        other = []
        for name in names:
            with gathered([parameters[name]]):
                if source is not None and not _is_equal(source.weights[name], parameters[name]):
                    other.append(name)
        if other:
            raise CheckpointError(
                f'{path} holds other weights for {len(other)} tensors that are frozen here ({_first(other)}), and '
                'checkpoints hold only what trains; set pretrained_model_name_or_path to a model with them, or tune '
                f'{", ".join(_parts(other, model))}'
            )


def _is_equal(weight: Weight, parameter: nn.Parameter) -> bool:
    if getattr(parameter, 'quant_state', None) is not None or not parameter.is_floating_point():
        return False  # quantised: it cannot be told
    return torch.equal(weight.read().to(parameter.dtype), parameter.detach().cpu())


def _first(names: list[str]) -> str:
    more = f', and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
    return ', '.join(name[:160] for name in names[:_NAMED]) + more
