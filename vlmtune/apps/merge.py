"""``vlmtune convert merge``: a base model and a LoRA adapter become one model."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmtune.apps.adapters import attach_adapter, find_adapter
from vlmtune.apps.export import (
    base_dtype,
    check_output,
    check_shard_size,
    choose_layout,
    new_folder,
    parse_export_dtype,
    save_model,
    write_processor_files,
)
from vlmtune.apps.model_card import write_card
from vlmtune.apps.original import Changed, changed_files, write_original
from vlmtune.apps.record import ExportRecord, read_record
from vlmtune.families import find_family
from vlmtune.layouts import read_config
from vlmtune.models import load_model
from vlmtune.models.loading import parse_dtype
from vlmtune.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def merge(
    base: str,
    adapter: str,
    output: str,
    *,
    max_shard_size: str = '5GB',
    dtype: str | None = None,
    device: str = 'auto',
    file_format: str | None = None,
) -> None:
    """Write ``base`` with ``adapter`` merged into its weights, as plain Auto classes load it.

    An adapter of ours that was trained on a quantised base is merged into that base, quantised again and then
    dequantised: its update corrects the rounding, so no other base gives the trained model.

    Args:
        base: a folder or a hub id.
        adapter: folder or hub id of a PEFT LoRA adapter.
        output: a folder that does not exist or is empty.
        max_shard_size: of one file.
        dtype: of the written weights; None keeps the base model's. Updates are added in float32 and cast once.
        device: where updates are computed: 'cpu', 'cuda', or 'auto' (a GPU if there is one).
        file_format: 'hf', or 'original' for the files, names, shapes and dtypes of the base; None is 'hf' where
            transformers has the family, else that of the base.

    Raises:
        UserError: anything that the user can mend; nothing is written then.
    """
    check_shard_size(max_shard_size)
    target = check_output(output)
    where = _merge_device(device)
    config = read_config(base)
    family = find_family(config.model_type)
    chosen = choose_layout(file_format, base=base, family=family, dtype=dtype)
    target_dtype = parse_export_dtype(dtype, base=config)
    source = find_adapter(adapter)
    record = read_record(source)
    if record is not None and record.family != family.model_type:
        raise CheckpointError(f'{adapter} was trained on a {record.family} model, but {base} is a {family.model_type}')
    changed = Changed()
    if chosen is not None:
        changed = changed_files(base, over=source, rows=record.vocab_size if record else None)
    adapted = _adapted_model(base, source, record=record, own_dtype=base_dtype(config), device=where)
    model = merge_adapter(adapted, dtype=target_dtype, device=where)
    with new_folder(target) as folder:
        if chosen is None:
            write_processor_files(base, over=source, folder=folder)
            save_model(model, folder, base=base, max_shard_size=max_shard_size)
        else:
            write_original(model, folder, base=base, layout=chosen, files=changed.files)
        is_original = chosen is not None
        write_card(
            folder, 'merged', family=family, base=base, record=record, is_original=is_original, note=changed.note
        )
    logger.info('wrote the merged model to %s', target)


def _merge_device(device: str) -> torch.device:
    if device not in ('auto', 'cpu', 'cuda'):
        raise ConfigError(f'--device {device}: expected cpu, cuda or auto')
    if device == 'cuda' and not torch.cuda.is_available():
        raise ConfigError('--device cuda: torch sees no GPU here; use --device cpu')
    return torch.device('cuda' if device != 'cpu' and torch.cuda.is_available() else 'cpu')


def _adapted_model(
    base: str, adapter: Path, *, record: ExportRecord | None, own_dtype: torch.dtype, device: torch.device
) -> 'PeftModel':
    quantization = record.quantization if record else None
    if record is None or quantization is None:
        model, _ = load_model(base, dtype=own_dtype)
    else:
        logger.info('the adapter was trained on an %s base: quantising it again, to dequantise and merge', quantization)
        model, _ = load_model(base, dtype=parse_dtype(record.dtype), quantization=quantization, device=device)
        model = model.dequantize()
    return attach_adapter(model, adapter)


@torch.no_grad()
def merge_adapter(adapted: 'PeftModel', *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Add the updates to the weights, in float32 on ``device``, layer by layer; returns the bare model in ``dtype``.

    Raises:
        CheckpointError: an update is not finite.
    """
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    was_tied = getattr(adapted.config, 'tie_word_embeddings', False)
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
            home = next(layer.parameters()).device
            layer.to(device=device, dtype=torch.float32)
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise CheckpointError(f'merging {name}: {error}') from error
            layer.to(device=home, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PEFT says of every layer that it is merged already, which is how we want it
        model = adapted.merge_and_unload()
    model.to(dtype)
    if was_tied:
        _settle_tying(model)
    return model


def _settle_tying(model: PreTrainedModel) -> None:
    """Make embeddings and head one tensor again if they still are equal; else say in the config that they are two."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = torch.equal(embeddings.get_parameter('weight'), head.get_parameter('weight'))
    if is_tied:
        head.weight = embeddings.weight
    else:
        logger.info('the adapter trained embeddings and head apart: they are written as two tensors')
    model.config.tie_word_embeddings = is_tied
