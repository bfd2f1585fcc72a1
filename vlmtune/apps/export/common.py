"""What every export shares: options, and the files that stand beside the weights."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from vlmtune.apps.export.output_folder import copy_inside
from vlmtune.apps.export.weight_files import write_weights
from vlmtune.data import Processor
from vlmtune.data.processor_files import JOINT_FILE, JOINT_TEMPLATE_FILE
from vlmtune.evaluation import stop_tokens
from vlmtune.families import Family
from vlmtune.layouts import Layout, find_layout, read_config
from vlmtune.models.lazy_model import LazyModel
from vlmtune.models.loading import DTYPES
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError
from vlmtune.utils.imports import import_name
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import read_source_json

_TEXT_FILES = (
    'tokenizer_config.json',
    'tokenizer.json',
    'tokenizer.model',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.json',
    'merges.txt',
    'chat_template.jinja',
    JOINT_TEMPLATE_FILE,
)
IMAGE_FILE = 'preprocessor_config.json'
_IMAGE_FILES = (IMAGE_FILE, JOINT_FILE, 'video_preprocessor_config.json')
_GENERATION_FILE = 'generation_config.json'


# ---- options


def parse_export_dtype(name: str | None, *, base: PreTrainedConfig) -> torch.dtype:
    """The dtype to write: the one that was asked for, else the base checkpoint's.

    Raises:
        ConfigError: an unknown name.
    """
    if name is None:
        return base_dtype(base)
    if name not in DTYPES:
        raise ConfigError(f'--dtype {name}: expected one of {", ".join(DTYPES)}')
    return DTYPES[name]


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


# ---- files beside the weights


def overlay_processor_files(source: Path, target: Path) -> None:
    """Copy the processor files that ``source`` has over those in ``target``; what it lacks stays as it is.

    Raises:
        CheckpointError: see ``copy_inside``.
    """
    if (source / 'chat_template.jinja').is_file():
        (target / JOINT_TEMPLATE_FILE).unlink(missing_ok=True)  # it would win over the file of the source
    for name in (*_TEXT_FILES, *_IMAGE_FILES):
        if (source / name).is_file():
            copy_inside(source / name, target / name, root=source)
    joint = read_source_json(str(target), JOINT_FILE) or {}
    if 'image_processor' in joint and (source / IMAGE_FILE).is_file() and not (source / JOINT_FILE).is_file():
        del joint['image_processor']  # the newer way to write the same thing; it would win over the file of the source
        write_json(target / JOINT_FILE, joint)


def write_processor_files(base: str, *, over: Path, folder: Path) -> None:
    """Write the processor files of ``base`` into ``folder``, then those of the folder ``over`` where it has some.

    Raises:
        ModelError: the files of the base cannot be read.
    """
    Processor(base).save(folder)
    overlay_processor_files(over, folder)


def load_processor(base: str, *, over: Path | None = None, **settings: Any) -> Processor:
    """The processor of ``base``, with the files of the folder ``over`` where it has some.

    Args:
        base: a folder or a hub id.
        over: of an adapter.
        settings: of ``Processor``, which win over what both say.

    Raises:
        ModelError: the files cannot be read.
        CheckpointError: those of ``over`` belong to another model.
        ConfigError: a setting cannot be right.
    """
    if over is None:
        return Processor(base, **settings)
    with tempfile.TemporaryDirectory() as folder:
        read_config(base).save_pretrained(folder)
        write_processor_files(base, over=over, folder=Path(folder))
        try:
            processor = Processor(folder, **settings)
        except ModelError as error:
            reason = str(error).replace(folder, f'{over} on {base}')
            raise CheckpointError(f'{over} does not fit {base}, it was made for another model: {reason}') from error
    processor.source = base  # what messages name; the folder is gone
    return processor


def save_model(model: LazyModel, folder: Path, *, base: str, max_shard_size: str) -> None:
    """Write weights, config and generation config into a folder that already has the processor files.

    The tokens that the chat template ends an answer with are added to the generation config, so that every program
    stops where the model was trained to stop.
    """
    write_weights(model, folder, max_shard_size=max_shard_size)
    config = model.outline.config
    config.dtype = str(model.dtype).removeprefix('torch.')
    config.architectures = [type(model.outline).__name__]
    config.save_pretrained(folder)
    text = config.get_text_config()
    settings = read_source_json(base, _GENERATION_FILE) or {
        name: getattr(text, name, None) for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')
    }
    old = settings.get('eos_token_id')
    first = [] if old is None else [old] if isinstance(old, int) else list(old)
    processor = Processor(str(folder))
    processor.save(folder)  # in both forms, the older and the newer
    stop = list(dict.fromkeys([*first, *stop_tokens(processor, old)]))
    settings = {**settings, 'eos_token_id': stop[0] if len(stop) == 1 else stop or None}
    write_json(folder / _GENERATION_FILE, {name: value for name, value in settings.items() if value is not None})
