"""``vlmtune convert merge``: a base model and a LoRA adapter become one model."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmtune.apps.export.adapters import attach_adapter, find_adapter
from vlmtune.apps.export.merged_weights import merged_weights
from vlmtune.apps.export.model_card import write_card
from vlmtune.apps.export.model_files import save_model
from vlmtune.apps.export.options import base_dtype, choose_layout
from vlmtune.apps.export.original import Changed, changed_files, write_original
from vlmtune.apps.export.output_folder import check_output, check_shard_size, new_folder
from vlmtune.apps.export.processor_files import write_processor_files
from vlmtune.apps.export.record import ExportRecord, read_record
from vlmtune.families import find_family
from vlmtune.layouts import Weight, read_config
from vlmtune.models.lazy_model import LazyModel, cast_all, grow_embeddings, open_lazily, settle_ties
from vlmtune.models.loading import build_outline, parse_dtype
from vlmtune.models.quantization import quantization_config
from vlmtune.models.rounding import quantized_again
from vlmtune.utils.device import named_device
from vlmtune.utils.errors import CheckpointError

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
    where = named_device(device)
    config = read_config(base)
    family = find_family(config.model_type)
    chosen = choose_layout(file_format, base=base, family=family, dtype=dtype)
    target_dtype = base_dtype(config) if dtype is None else parse_dtype(dtype)
    source = find_adapter(adapter)
    record = read_record(source)
    if record is not None and record.family != family.model_type:
        raise CheckpointError(f'{adapter} was trained on a {record.family} model, but {base} is a {family.model_type}')
    changed = Changed()
    if chosen is not None:
        changed = changed_files(base, over=source, rows=record.vocab_size if record else None)
    own_dtype = base_dtype(config) if record is None or record.quantization is None else parse_dtype(record.dtype)
    model = open_lazily(base, dtype=own_dtype)
    merged = _merged_model(model, source, record=record, device=where)
    model = settle_ties(replace(merged, weights=cast_all(merged.weights, target_dtype), dtype=target_dtype))
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


def _merged_model(model: LazyModel, adapter: Path, *, record: ExportRecord | None, device: torch.device) -> LazyModel:
    weights: Mapping[str, Weight] = model.weights
    quantization = record.quantization if record else None
    if quantization is not None:
        logger.info('the adapter was trained on an %s base: quantising it again, to dequantise and merge', quantization)
        config = quantization_config(
            quantization, family=find_family(model.outline.config.model_type), dtype=model.dtype
        )
        weights = quantized_again(weights, _twin(model), config=config, device=device)
    adapted = attach_adapter(_twin(model), adapter)
    bare: Any = adapted.get_base_model()
    rows: int = bare.get_input_embeddings().weight.shape[0]
    grown = grow_embeddings(replace(model, weights=weights), rows)
    return replace(grown, weights=merged_weights(grown, adapted, device=device))


def _twin(model: LazyModel) -> PreTrainedModel:
    """A second outline, for what changes the modules of one."""
    return build_outline(copy.deepcopy(model.outline.config))
