"""``vlmtune convert pth_to_hf``: from a checkpoint of ours to a PEFT adapter or a full Hugging Face model."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmtune.apps.export.adapter_layout import adapter_config, adapter_tensors, saved_modules
from vlmtune.apps.export.merge import merge
from vlmtune.apps.export.model_card import Kind, write_card
from vlmtune.apps.export.model_files import save_model
from vlmtune.apps.export.options import base_dtype, choose_layout
from vlmtune.apps.export.original import changed_files, write_original
from vlmtune.apps.export.output_folder import check_output, check_shard_size, new_folder
from vlmtune.apps.export.processor_files import overlay_processor_files
from vlmtune.apps.export.projector import write_projector
from vlmtune.apps.export.record import ExportRecord, write_record
from vlmtune.apps.export.run_results import read_results
from vlmtune.apps.export.trained import Base, Trained, check_fit, find_base, read_base, read_trained, vocabulary_rows
from vlmtune.config import load_config
from vlmtune.layouts import Layout, find_source
from vlmtune.models.lazy_model import LazyModel, grow_embeddings, open_lazily, settle_ties, with_trained
from vlmtune.models.loading import parse_dtype
from vlmtune.utils.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vlmtune.utils.device import named_device
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.json_files import write_json

logger = logging.getLogger(__name__)


def pth_to_hf(
    config: str,
    checkpoint: str,
    output: str,
    *,
    max_shard_size: str = '5GB',
    dtype: str | None = None,
    device: str = 'auto',
    file_format: str | None = None,
) -> None:
    """Write what a checkpoint holds as a PEFT adapter (if a part was tuned by LoRA) or as a full model.

    An adapter needs no weight of the base model. A full model is the base with the trained weights in it. A LLaVA that
    was put together of parts is always written as a full one, with its adapter merged: nobody else has its base.

    Args:
        config: of the run: a path or the name of a built-in recipe. The checkpoint knows what it was trained from; this
            is where the base model is looked for if it is no longer there.
        checkpoint: a directory ``iter_N.pth``.
        output: a folder that does not exist or is empty.
        max_shard_size: of one file of a full model.
        dtype: of the written weights: 'float32', 'bfloat16', 'float16'. None keeps the base model's for a full model,
            and the float32 of training for an adapter, which is small.
        device: 'cpu', 'cuda', 'auto': where the adapter of a LLaVA from parts is merged; nothing else is computed.
        file_format: of a full model: 'hf', or 'original' for the files, names, shapes and dtypes of the base; None is
            'hf' where transformers has the family, else that of the base. An adapter has the one form of PEFT.
            'projector' for the projector of a LLaVA alone, as XTuner writes it.

    Raises:
        UserError: anything that the user can mend; nothing is written then.
    """
    named_device(device)
    check_shard_size(max_shard_size)
    target = check_output(output)
    cfg = load_config(config)
    trained = read_trained(Path(checkpoint).expanduser())
    source = find_base(trained, fallback=cfg.get('model') or {})
    base = read_base(find_source(source))
    is_adapter = trained.adapter_config is not None
    chosen = _choose_layout(file_format, base=base, is_adapter=is_adapter, dtype=dtype)
    target_dtype = base_dtype(base.config) if dtype is None else parse_dtype(dtype)
    check_fit(trained, base=base)
    record = _record(trained, base=base, config=config)
    if file_format == 'projector':
        with new_folder(target) as staging:
            write_projector(trained, staging, base=base, dtype=None if dtype is None else target_dtype)
        logger.info('wrote the projector to %s', target)
        return
    if is_adapter and not isinstance(source, str):
        with tempfile.TemporaryDirectory(prefix='vlmtune-adapter-') as folder:
            _write_adapter(trained, Path(folder), base=base, record=record)
            merge(base.name_or_path, folder, output, max_shard_size=max_shard_size, dtype=dtype, device=device)
        return
    note = ''
    with new_folder(target) as staging:
        if is_adapter:
            _write_adapter(trained, staging, base=base, record=record, dtype=None if dtype is None else target_dtype)
        elif chosen is None:
            overlay_processor_files(trained.processor_files, staging)
            model = _trained_model(trained, base=base, dtype=target_dtype)
            save_model(model, staging, base=base.name_or_path, max_shard_size=max_shard_size)
        else:
            note = _write_original(trained, staging, base=base, layout=chosen, dtype=target_dtype)
        kind: Kind = 'adapter' if is_adapter else 'full'
        shown: dict[str, Any] = dict(family=base.family, base=base.name_or_path, record=record, note=note)
        write_card(staging, kind, is_original=bool(chosen), **shown)
    logger.info('wrote %s to %s', 'a PEFT adapter' if is_adapter else 'a full model', target)


def _choose_layout(asked: str | None, *, base: Base, is_adapter: bool, dtype: str | None) -> Layout | None:
    """The layout of a full model; None is that of transformers."""
    if asked == 'projector':
        return None
    if not is_adapter:
        return choose_layout(asked, base=base.name_or_path, family=base.family, dtype=dtype)
    if asked == 'original' and choose_layout(asked, base=base.name_or_path, family=base.family) is not None:
        raise ConfigError(
            '--format original: the checkpoint holds an adapter, which does not fit the original layout; leave it out, '
            'and merge the adapter by vlmtune convert merge BASE ADAPTER OUT --format original'
        )
    if asked not in (None, 'hf', 'original'):
        raise ConfigError(f'--format {asked}: expected hf or original')
    return None


def _write_adapter(
    trained: Trained, folder: Path, *, base: Base, record: ExportRecord, dtype: torch.dtype | None = None
) -> None:
    overlay_processor_files(trained.processor_files, folder)
    write_record(record, folder)
    modules = saved_modules(trained, base=base)
    name = os.path.abspath(base.name_or_path) if os.path.isdir(base.name_or_path) else base.name_or_path
    config = adapter_config(trained, base=base, base_name=name, modules_to_save=modules)
    write_json(folder / ADAPTER_CONFIG, config)
    tensors = adapter_tensors(trained, base=base)
    save_file(
        {key: _cast(tensor, dtype) for key, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS, {'format': 'pt'}
    )


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _write_original(trained: Trained, folder: Path, *, base: Base, layout: Layout, dtype: torch.dtype) -> str:
    rows = vocabulary_rows(trained, base=base)
    changed = changed_files(base.name_or_path, over=trained.processor_files, rows=rows)
    model = _trained_model(trained, base=base, dtype=dtype)
    write_original(model, folder, base=base.name_or_path, layout=layout, files=changed.files)
    return changed.note


def _trained_model(trained: Trained, *, base: Base, dtype: torch.dtype) -> LazyModel:
    model = open_lazily(base.name_or_path, dtype=dtype)
    rows = vocabulary_rows(trained, base=base)
    if rows is not None:
        model = grow_embeddings(model, rows)
    return settle_ties(with_trained(model, trained.tensors))


def _record(trained: Trained, *, base: Base, config: str) -> ExportRecord:
    settings = trained.model_settings
    return ExportRecord(
        family=base.family.model_type,
        quantization=settings.get('quantization'),
        dtype=settings.get('dtype', 'bfloat16'),
        vocab_size=vocabulary_rows(trained, base=base),
        parts=trained.trained_by_part(family=base.family),
        config=Path(config).stem,
        data=trained.data_names(),
        iteration=trained.iteration,
        metrics=read_results(trained.path),
    )
