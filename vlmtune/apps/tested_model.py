"""The model that ``vlmtune test`` asks: a checkpoint of ours, an export, or a base model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from vlmtune.apps.chat.answering import load_answerer, split_adapter_folder
from vlmtune.apps.export.adapters import ADAPTER_CONFIG, base_of, find_adapter
from vlmtune.apps.export.common import load_processor
from vlmtune.data import Processor
from vlmtune.engine.checkpoint import WEIGHTS_FILE
from vlmtune.engine.manifest import MANIFEST, read_manifest, verify
from vlmtune.engine.runner import build_model
from vlmtune.engine.strategies import WholeWeights, to_device
from vlmtune.layouts import find_source
from vlmtune.registry import PROCESSORS
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import CheckpointError

_MODEL_SETTINGS = ('pretrained_model_name_or_path', 'quantization', 'dtype', 'attn_implementation', 'revision')
_EXPORTED = ('image_processor', 'prompt_template')
"""What a config sets and an export brings along as well; the config wins, so that other resolutions can be tried."""


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


def load_tested_processor(cfg: Config, checkpoint: str | Mapping[str, Any]) -> Processor:
    """The processor of what ``load_tested`` loads, without any weight.

    Raises:
        UserError: it is missing or damaged.
    """
    if is_checkpoint(checkpoint):
        verify(_folder(checkpoint))
        return PROCESSORS.build(cfg.processor)
    settings = {name: cfg.processor[name] for name in _EXPORTED if cfg.processor.get(name)}
    base, adapter = split_adapter_folder(checkpoint, None) if isinstance(checkpoint, str) else (checkpoint, None)
    return load_processor(find_source(base), over=find_adapter(adapter) if adapter else None, **settings)


def load_tested(cfg: Config, checkpoint: str | Mapping[str, Any], *, processor: Processor) -> TestedModel:
    """Load what a user calls a checkpoint.

    Args:
        cfg: of the run. A checkpoint ``iter_N.pth`` is put on its model, which is built as for training,
            quantised where it says so; of the others only the settings of images and of the chat template come from it.
        checkpoint: ``iter_N.pth``, the folder of an adapter or of a model, a hub id, or the parts of a LLaVA.
        processor: of ``load_tested_processor``.

    Raises:
        UserError: it is missing, damaged, or does not fit.
    """
    if is_checkpoint(checkpoint):
        return _load_trained(cfg, _folder(checkpoint), processor=processor)
    answerer = load_answerer(checkpoint, prompt_template=cfg.processor.get('prompt_template'))
    return TestedModel(answerer.model, _key_of_files(checkpoint), answerer.autocast_dtype)


def is_checkpoint(checkpoint: str | Mapping[str, Any]) -> bool:
    """Whether it is one of ours, or is called like one."""
    return isinstance(checkpoint, str) and (
        (_folder(checkpoint) / MANIFEST).is_file() or _folder(checkpoint).suffix == '.pth'
    )


def _folder(checkpoint: Any) -> Path:
    return Path(checkpoint).expanduser()


def _load_trained(cfg: Config, folder: Path, *, processor: Processor) -> TestedModel:
    files = read_manifest(folder)['files']
    if WEIGHTS_FILE not in files:
        raise CheckpointError(f'{folder} has no {WEIGHTS_FILE}, so it cannot be tested')
    model = build_model(cfg, processor=processor)
    weights = WholeWeights()
    weights.model = model
    weights.load_trainable(folder / WEIGHTS_FILE)
    to_device(model, find_device())
    settings = {name: cfg.model.get(name) for name in _MODEL_SETTINGS}
    key = f'{files[WEIGHTS_FILE]["sha256"]} {json.dumps(settings, sort_keys=True, default=str)}'
    return TestedModel(model.model, key, model.dtype)


def _key_of_files(checkpoint: str | Mapping[str, Any]) -> str:
    """The names of a model's files, their sizes and when they were changed; of an adapter with those of its base."""
    named = [checkpoint] if isinstance(checkpoint, str) else [str(value) for value in checkpoint.values()]
    if isinstance(checkpoint, str) and (Path(checkpoint).expanduser() / ADAPTER_CONFIG).is_file():
        named.append(base_of(Path(checkpoint).expanduser()) or '')
    seen = []
    for name in named:
        folder = Path(name).expanduser()
        files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
        seen.append((name, [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]))
    return hashlib.sha256(repr(seen).encode()).hexdigest()
