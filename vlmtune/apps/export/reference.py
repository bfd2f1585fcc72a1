"""The trained model that an export is compared with: a checkpoint put on its base exactly as it was trained."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtune.apps.export.check_inputs import ask
from vlmtune.apps.export.processor_files import load_processor
from vlmtune.apps.export.trained import (
    Base,
    Trained,
    build_untrained,
    find_base,
    read_base,
    read_trained,
    vocabulary_rows,
)
from vlmtune.config import load_config
from vlmtune.data import Processor
from vlmtune.layouts import find_source


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
    base = read_base(find_source(find_base(trained, fallback=load_config(config).get('model') or {})))
    processor = load_processor(base.name_or_path, over=trained.processor_files)
    rows = vocabulary_rows(trained, base=base)
    shapes = _shapes(base.outline, rows=rows, resized={*base.family.embeddings, *base.family.lm_head})
    untrained, logits, dtype = _ask(trained, base, processor)
    rounds = trained.model_settings.get('quantization') == 'int8'
    return Reference(logits, untrained, shapes, processor, dtype, rounds)


def _ask(trained: Trained, base: Base, processor: Processor) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    model = build_untrained(trained, base=base)
    untrained = ask(model.model, processor, autocast_dtype=model.dtype)
    model.load_trainable(trained.tensors)
    logits, dtype = ask(model.model, processor, autocast_dtype=model.dtype), model.dtype
    del model
    gc.collect()
    return untrained, logits, dtype


def _shapes(outline: Any, *, rows: int | None, resized: set[str]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    if rows is not None:
        for name in shapes:
            if name.rpartition('.')[0] in resized:
                shapes[name] = (rows, *shapes[name][1:])
    return shapes
