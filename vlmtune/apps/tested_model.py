"""The model that ``vlmtune test`` asks: a checkpoint of ours, an export, or a base model."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from vlmtune.apps.chat.answering import load_answerer
from vlmtune.apps.export.adapters import find_adapter
from vlmtune.apps.export.processor_files import load_processor
from vlmtune.apps.export.trained import Trained, build_untrained, find_base, read_base, read_trained
from vlmtune.data import Processor
from vlmtune.engine.manifest import MANIFEST
from vlmtune.layouts import find_source
from vlmtune.utils.adapter_folder import split_adapter

logger = logging.getLogger(__name__)

_SETTINGS = ('image_processor', 'prompt_template')
"""What a config sets and a checkpoint brings along as well; the config wins, so that others can be tried."""
_OWN = ('tune', 'lora', 'quantization', 'dtype')  # what a checkpoint was trained with


@dataclass(frozen=True)
class TestedModel:
    """A model that answers.

    Attributes:
        model: of transformers, on its device.
        key: what tells these weights from others.
        autocast_dtype: what to compute in; None: the dtype of the weights.
    """

    model: Any
    key: str
    autocast_dtype: torch.dtype | None


def open_tested(checkpoint: str | Mapping[str, Any]) -> Trained | str | Mapping[str, Any]:
    """A checkpoint ``iter_N.pth`` verified and opened; anything else as it is.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or holds no weights.
    """
    if isinstance(checkpoint, str):
        folder = Path(checkpoint).expanduser()
        if folder.suffix == '.pth' or (folder / MANIFEST).is_file():
            return read_trained(folder)
    return checkpoint


def load_tested_processor(cfg: Config, checkpoint: Trained | str | Mapping[str, Any]) -> Processor:
    """The processor of what ``load_tested`` loads, without any weight.

    Raises:
        UserError: it is missing or damaged.
    """
    settings = {name: cfg.processor[name] for name in _SETTINGS if cfg.processor.get(name)}
    if isinstance(checkpoint, Trained):
        return load_processor(_base_of(checkpoint, cfg), over=checkpoint.processor_files, **settings)
    base, adapter = split_adapter(checkpoint) if isinstance(checkpoint, str) else (checkpoint, None)
    return load_processor(find_source(base), over=find_adapter(adapter) if adapter else None, **settings)


def load_tested(cfg: Config, checkpoint: Trained | str | Mapping[str, Any]) -> TestedModel:
    """Load what a user calls a checkpoint.

    Args:
        cfg: of the run. Only the settings of images and of the chat template come from it, and ``attn_implementation``;
            a checkpoint ``iter_N.pth`` says itself what it was trained from and how.
        checkpoint: of ``open_tested``: ``iter_N.pth``, the folder of an adapter or of a model, a hub id, or the parts
            of a LLaVA.

    Raises:
        UserError: it is missing, damaged, or does not fit.
    """
    if isinstance(checkpoint, Trained):
        return _load_trained(cfg, checkpoint)
    answerer = load_answerer(checkpoint, prompt_template=cfg.processor.get('prompt_template'))
    return TestedModel(answerer.model, _key_of_files(checkpoint), answerer.autocast_dtype)


def _base_of(trained: Trained, cfg: Config) -> str:
    return find_source(find_base(trained, fallback=cfg.model))


def _load_trained(cfg: Config, trained: Trained) -> TestedModel:
    own = trained.model_settings
    if others := [name for name in _OWN if json.dumps(cfg.model.get(name)) != json.dumps(own.get(name))]:
        logger.warning('%s of the model as %s says, not as the config says', ' and '.join(others), trained.path)
    base, attention = read_base(_base_of(trained, cfg)), cfg.model.get('attn_implementation') or 'sdpa'
    model = build_untrained(trained, base=base, attn_implementation=attention)
    model.load_trainable(trained.tensors)
    key = f'{trained.digest} {base.name_or_path} {json.dumps([own, attention], sort_keys=True, default=str)}'
    return TestedModel(model.model, key, model.dtype)


def _key_of_files(checkpoint: str | Mapping[str, Any]) -> str:
    """The names of a model's files, their sizes and when they were changed; of an adapter with those of its base.

    Folders count with all that lies below: XTuner writes a projector into one of its own.
    """
    named = split_adapter(checkpoint) if isinstance(checkpoint, str) else checkpoint.values()
    seen = []
    for name in map(str, filter(None, named)):
        place = Path(name).expanduser()
        files = [place] if place.is_file() else sorted(file for file in place.rglob('*') if file.is_file())
        seen.append((name, [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]))
    return hashlib.sha256(repr(seen).encode()).hexdigest()
