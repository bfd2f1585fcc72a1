"""Loads a checkpoint and takes no excuse: transformers itself only warns of weights that are missing or left over."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from vlmtune.families import find_family
from vlmtune.layouts import find_layout, open_weights, read_config
from vlmtune.models.loading import WITH_REPORT, auto_class, load_model, refuse_misfit
from vlmtune.utils.pretrained import load_pretrained


def load_strict(
    name_or_path: str, *, dtype: torch.dtype | str = 'auto', revision: str | None = None
) -> PreTrainedModel:
    """A model whose every weight came from the checkpoint, and which took every weight of it; on the CPU.

    Args:
        name_or_path: a folder or a hub id, in any layout that is known.
        dtype: of the weights; 'auto' for that of the checkpoint.
        revision: of a hub id.

    Raises:
        ModelError: a file or a weight is missing, unknown, or of another shape; the first is named.
    """
    if find_layout(name_or_path, revision=revision) is not None:
        own = read_config(name_or_path, revision=revision).dtype or torch.float32
        return load_model(name_or_path, dtype=own if dtype == 'auto' else dtype, revision=revision)[0]  # type: ignore[arg-type]
    if (folder := Path(name_or_path).expanduser()).is_dir():
        open_weights(folder)  # names the file that is missing or broken
    family = find_family(read_config(name_or_path, revision=revision).model_type)
    model, info = load_pretrained(auto_class(family), name_or_path, revision=revision, dtype=dtype, **WITH_REPORT)
    refuse_misfit(name_or_path, info)
    return model
