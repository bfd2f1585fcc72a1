"""The trained model that an export is compared with: a checkpoint put on its base exactly as it was trained."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtune.apps.export.check_inputs import ask
from vlmtune.apps.export.common import load_processor
from vlmtune.apps.export.trained import Trained, check_fit, read_base, read_trained, vocabulary_rows
from vlmtune.config import load_config
from vlmtune.data import Processor
from vlmtune.engine.strategies import to_device
from vlmtune.layouts import find_source
from vlmtune.models import SupervisedFinetune
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import ConfigError

_KEY = 'pretrained_model_name_or_path'
_SETTINGS = ('tune', 'lora', 'quantization', 'dtype', 'attn_implementation', 'revision')


@dataclass(frozen=True)
class Reference:
    """What a trained model says to the fixed prompts; the model itself is gone again.

    Attributes:
        logits: float32[L, V] of each prompt.
        untrained: the same of the model before its training.
        shapes: of all weights of the model, by their names; without adapters.
        processor: that it was trained with.
        dtype: that it computes in.
        rounds_activations: the base is quantised so that its activations are rounded, too.
    """

    logits: list[Tensor]
    untrained: list[Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    processor: Processor
    dtype: torch.dtype
    rounds_activations: bool


@torch.no_grad()
def trained_reference(config: str, checkpoint: str) -> Reference:
    """Ask a trained model the fixed prompts, before and after its training.

    Args:
        config: of the run; where the base model is looked for if the checkpoint does not say.
        checkpoint: a directory ``iter_N.pth``.

    Raises:
        UserError: it is missing, damaged, or its base model is.
    """
    trained = read_trained(Path(checkpoint).expanduser())
    source = trained.model_settings.get(_KEY) or (load_config(config).get('model') or {}).get(_KEY)
    if not source:
        raise ConfigError(f'neither {config} nor {checkpoint} has a model with {_KEY}')
    base = read_base(find_source(source))
    check_fit(trained, base=base)
    processor = load_processor(base.name_or_path, over=trained.processor_files)
    rows = vocabulary_rows(trained, base=base)
    shapes = _shapes(base.outline, rows=rows, resized={*base.family.embeddings, *base.family.lm_head})
    untrained, logits, dtype = _ask(trained, base.name_or_path, processor, rows=rows)
    rounds = trained.model_settings.get('quantization') == 'int8'
    return Reference(logits, untrained, shapes, processor, dtype, rounds)


def _ask(
    trained: Trained, base: str, processor: Processor, *, rows: int | None
) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    settings = {name: trained.model_settings[name] for name in _SETTINGS if trained.model_settings.get(name)}
    model = SupervisedFinetune(base, **settings, vocab_size=rows, device=str(find_device()))
    to_device(model, find_device())
    untrained = ask(model.model, processor, autocast_dtype=model.dtype)
    places = model.named_trainable()
    for name, tensor in trained.tensors.items():
        places[name].copy_(tensor)
    logits, dtype = ask(model.model, processor, autocast_dtype=model.dtype), model.dtype
    del model, places
    gc.collect()
    return untrained, logits, dtype


def _shapes(outline: Any, *, rows: int | None, resized: set[str]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    if rows is not None:
        for name in shapes:
            if name.rpartition('.')[0] in resized:
                shapes[name] = (rows, *shapes[name][1:])
    return shapes
