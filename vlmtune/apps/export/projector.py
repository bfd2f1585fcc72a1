"""The projector of a LLaVA alone, in the folder that XTuner writes it in."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlmtune.apps.export.trained import Base, Trained
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.json_files import write_json

FOLDER = 'projector'
_MODEL_TYPE = 'llava'
_OURS = 'model.multi_modal_projector.'
_THEIRS = {'linear_1.': 'model.0.', 'linear_2.': 'model.2.'}


def write_projector(trained: Trained, folder: Path, *, base: Base, dtype: torch.dtype | None = None) -> None:
    """Write ``projector/``, which ``pretrained_pth`` of a LLaVA from parts and XTuner read.

    Args:
        trained: a checkpoint in which the projector learned and nothing else did.
        folder: an empty one.
        base: the LLaVA that it was trained in.
        dtype: of the weights; None keeps that of the training.

    Raises:
        ConfigError: something else was trained, or the model is no LLaVA.
    """
    if base.family.model_type != _MODEL_TYPE:
        raise ConfigError(
            f'--format projector: {base.name_or_path} is a {base.family.model_type}, and only a LLaVA has a projector '
            'that is kept alone; leave --format out'
        )
    others = sorted(name for name in trained.tensors if not name.startswith(_OURS))
    if others or not trained.tensors:
        what = f'also holds {others[0]}' if others else 'holds no projector'
        raise ConfigError(
            f'--format projector: {trained.path} {what}; leave --format out to write all that was trained'
        )
    tensors = {name.removeprefix(_OURS): tensor for name, tensor in trained.tensors.items()}
    for ours, theirs in _THEIRS.items():
        tensors = {name.replace(ours, theirs, 1): tensor for name, tensor in tensors.items()}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    text, vision = tensors['model.0.weight'].shape
    settings: dict[str, Any] = dict(model_type=FOLDER, depth=2, hidden_act='gelu', bias=True)
    settings |= dict(visual_hidden_size=vision, llm_hidden_size=text)
    place = folder / FOLDER
    place.mkdir()
    save_file(tensors, place / 'model.safetensors', {'format': 'pt'})
    write_json(place / 'config.json', settings)
