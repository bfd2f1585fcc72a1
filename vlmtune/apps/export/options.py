"""What an export is written in: the dtype and the layout, by what was asked for and what the base is."""

import torch
from transformers import PreTrainedConfig

from vlmtune.families import Family
from vlmtune.layouts import Layout, find_layout
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.imports import import_name


def base_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of a checkpoint's weights; float32 where its config does not say."""
    found = config.dtype or config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def choose_layout(asked: str | None, *, base: str, family: Family, dtype: str | None = None) -> Layout | None:
    """The layout to write a model in; None is that of transformers, or of our class where it has no such model.

    Args:
        asked: 'hf', 'original', or None for 'hf' where transformers has the family, else that of the base.
        base: folder or hub id of the base model.
        family: of the base model.
        dtype: of the weights if one was asked for.

    Raises:
        ConfigError: the model cannot be written so.
    """
    if asked not in (None, 'hf', 'original'):
        raise ConfigError(f'--format {asked}: expected hf or original')
    layout, is_native = find_layout(base), family.model is None
    # Where weights come from several places, there are no files to copy.
    originals = [name for name, dotted in family.layouts if import_name(dotted).open_weights is None]
    if layout is not None and layout.open_weights is not None:
        layout = None
    # A class of ours whose base lies as it writes it has one form only, under neither name.
    if asked == 'hf' and not is_native:
        way_out = 'leave --format out' if layout is None else 'write --format original'
        raise ConfigError(f'--format hf: transformers has no {family.model_type}; {way_out}')
    if asked == 'original' and layout is None:
        way_out = 'write --format hf' if is_native else 'leave --format out'
        if not originals:
            raise ConfigError(f'--format original: {family.model_type} has no original layout; {way_out}')
        raise ConfigError(
            f'--format original: {base} is no checkpoint in an original layout of {family.model_type} '
            f'({", ".join(originals)}), whose files could be copied; {way_out}'
        )
    if layout is None or asked == 'hf' or (asked is None and is_native):
        return None
    if dtype is not None:
        raise ConfigError(f'--dtype {dtype}: --format original keeps the dtype of every weight of {base}; leave it out')
    return layout
