"""A checkpoint of ours as an export sees it: the trained tensors, and what it says about how they were trained."""

import logging
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlmtune.config.unrun import read_unrun
from vlmtune.engine.checkpoint import CONFIG_FILE, PROCESSOR_DIR, WEIGHTS_FILE
from vlmtune.engine.manifest import verify
from vlmtune.engine.strategies import to_device
from vlmtune.families import Family, find_family
from vlmtune.layouts import read_config
from vlmtune.models import SupervisedFinetune
from vlmtune.models.loading import build_outline
from vlmtune.models.tuning import part_of
from vlmtune.utils.adapter_folder import ADAPTER_CONFIG, adapter_settings
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import CheckpointError, ConfigError
from vlmtune.utils.hub import looks_like_id

logger = logging.getLogger(__name__)

_BASE = 'pretrained_model_name_or_path'
_SETTINGS = ('tune', 'lora', 'quantization', 'dtype', 'revision')  # those that make it the model that it is
_LORA = '.lora_'


@dataclass(frozen=True)
class Trained:
    """A checkpoint whose every file was verified.

    Attributes:
        path: the directory.
        iteration: optimizer steps done.
        tensors: trained weights by their names inside the transformers model.
        settings: its resolved config as plain data; classes are strings.
        adapter_config: PEFT's settings if a part was tuned by LoRA, else None.
        digest: of the trained weights.
    """

    path: Path
    iteration: int
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    adapter_config: Mapping[str, Any] | None
    digest: str

    @property
    def processor_files(self) -> Path:
        """The folder of the tokenizer and the image processor that it was trained with."""
        return self.path / PROCESSOR_DIR

    @property
    def model_settings(self) -> Mapping[str, Any]:
        """The config of the model: pretrained_model_name_or_path, quantization, dtype, ..."""
        return self.settings.get('model') or {}

    def lora_layers(self) -> set[str]:
        """Names of the adapted layers."""
        return {name.partition(_LORA)[0] for name in self.tensors if _LORA in name}

    def full_tensors(self) -> set[str]:
        """Names of the tensors that were trained themselves."""
        return {name for name in self.tensors if _LORA not in name}

    def trained_by_part(self, *, family: Family) -> dict[str, tuple[str, int]]:
        """Mode and number of trained weights of every part that learned."""
        found: dict[str, tuple[str, int]] = {}
        for name, tensor in self.tensors.items():
            part, mode = part_of(name, family=family), 'lora' if _LORA in name else 'full'
            found[part] = (mode, found.get(part, (mode, 0))[1] + tensor.numel())
        return found

    def data_names(self) -> list[str]:
        """The data sets that it was trained on: names of files and folders, ids on a hub."""
        return list(dict.fromkeys(data_names(self.settings.get('train_dataloader'))))


def read_trained(path: Path) -> Trained:
    """Verify and read a checkpoint directory; nothing in it is executed.

    Raises:
        CheckpointError: it is missing, half-written, damaged or foreign.
    """
    manifest = verify(path)
    if missing := [name for name in (WEIGHTS_FILE, CONFIG_FILE) if name not in manifest['files']]:
        raise CheckpointError(f'{path} has no {" and no ".join(missing)}, so it can be neither exported nor tested')
    _refuse_additions(path, known=manifest['files'])
    return Trained(
        path=path,
        iteration=int(manifest['iteration']),
        tensors=load_file(path / WEIGHTS_FILE),
        settings=read_unrun((path / CONFIG_FILE).read_bytes(), name=str(path / CONFIG_FILE), error=CheckpointError),
        adapter_config=adapter_settings(path) if ADAPTER_CONFIG in manifest['files'] else None,
        digest=manifest['files'][WEIGHTS_FILE]['sha256'],
    )


def _refuse_additions(path: Path, *, known: Container[str]) -> None:
    """The folder of the processor is read as a whole, so that it must hold nothing but what was saved."""
    found = (file.relative_to(path).as_posix() for file in (path / PROCESSOR_DIR).rglob('*') if not file.is_dir())
    if added := sorted(name for name in found if name not in known):
        raise CheckpointError(f'{path}: {added[0]} was added after it was saved; remove it')


def data_names(node: Any, key: str = '') -> Iterator[str]:
    """Every ``path`` of a config or a part of one: names of files and folders, ids on a hub."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from data_names(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from data_names(value, key)
    elif key == 'path' and isinstance(node, str):
        is_id = looks_like_id(node) and not os.path.exists(node)
        yield node if is_id else os.path.basename(node.rstrip('/'))


# ---- the model it was trained from


@dataclass(frozen=True)
class Base:
    """A base model, known by its config alone: ``outline`` is the whole module tree on the meta device."""

    name_or_path: str
    family: Family
    config: PreTrainedConfig
    outline: nn.Module


def find_base(trained: Trained, *, fallback: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Where the base model is, or its parts are: as the checkpoint says, or, if that is gone, as the config says.

    Args:
        trained: the checkpoint.
        fallback: the ``model`` of a config.

    Raises:
        ConfigError: neither says.
    """
    recorded, given = trained.model_settings.get(_BASE), fallback.get(_BASE)
    if not recorded:
        if not given:
            raise ConfigError(f'neither the config nor {trained.path} has a model with {_BASE}')
        return given if isinstance(given, Mapping) else str(given)
    if isinstance(recorded, Mapping):
        return _parts_at_hand(recorded, given=given if isinstance(given, Mapping) else {})
    is_gone = not os.path.isdir(os.path.expanduser(recorded)) and not looks_like_id(recorded)
    if is_gone and isinstance(given, str) and given != recorded:
        logger.warning('%s, the base model of the checkpoint, is gone; taking %s from the config', recorded, given)
        return given
    if given and given != recorded:
        logger.info('the base model is %s, as the checkpoint says, not %s', recorded, given)
    return str(recorded)


def _parts_at_hand(recorded: Mapping[str, Any], *, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a LLaVA as the checkpoint says; local ones that are gone as the config says."""
    parts = dict(recorded)
    for name, place in recorded.items():
        other = given.get(name)
        is_path = isinstance(place, str) and (name == 'pretrained_pth' or not looks_like_id(place))
        if is_path and isinstance(other, str) and other != place and not os.path.exists(os.path.expanduser(place)):
            logger.warning('%s %s of the checkpoint is gone; taking %s from the config', name, place, other)
            parts[name] = other
    return parts


def read_base(name_or_path: str) -> Base:
    """The outline of a model; no weight is read.

    Raises:
        ModelError: it is missing or its family is not supported.
    """
    config = read_config(name_or_path)
    return Base(name_or_path, find_family(config.model_type), config, build_outline(config))


def vocabulary_rows(trained: Trained, *, base: Base) -> int | None:
    """Rows of the trained embeddings if there are more than the base has; else None."""
    embeddings = trained.tensors.get(f'{base.family.embeddings[0]}.weight')
    rows = None if embeddings is None else embeddings.shape[0]
    have = base.outline.get_parameter(f'{base.family.embeddings[0]}.weight').shape[0]
    return rows if rows is not None and rows > have else None


def check_fit(trained: Trained, *, base: Base) -> None:
    """Raise unless every trained tensor has its place in the base model.

    Raises:
        CheckpointError: the checkpoint was trained from another model.
    """
    parameters, modules = dict(base.outline.named_parameters()), dict(base.outline.named_modules())
    resized = {*base.family.embeddings, *base.family.lm_head} if vocabulary_rows(trained, base=base) else set()
    wrong = sorted(name for name in trained.lora_layers() if not isinstance(modules.get(name), nn.Linear))
    for name in sorted(trained.full_tensors()):
        have, want = trained.tensors[name].shape, parameters[name].shape if name in parameters else None
        if want is not None and name.rpartition('.')[0] in resized:
            have, want = have[1:], want[1:]
        if have != want:
            wrong.append(name)
    if wrong:
        raise CheckpointError(
            f'{trained.path} was not trained from {base.name_or_path}: {len(wrong)} of its tensors have no place there '
            f'(first: {wrong[0]}); use the config that made it'
        )


def build_untrained(trained: Trained, *, base: Base, attn_implementation: str = 'sdpa') -> SupervisedFinetune:
    """The base model with the settings that a checkpoint was trained with, and none of its weights.

    Args:
        trained: the checkpoint.
        base: of ``find_base``.
        attn_implementation: as of ``SupervisedFinetune``; the one of the training may need another device.

    Raises:
        UserError: the base model cannot be loaded, or does not fit.
    """
    check_fit(trained, base=base)
    settings = {name: trained.model_settings[name] for name in _SETTINGS if trained.model_settings.get(name)}
    rows = vocabulary_rows(trained, base=base)
    settings |= dict(vocab_size=rows, attn_implementation=attn_implementation, device=str(find_device()))
    model = SupervisedFinetune(base.name_or_path, **settings)
    to_device(model, find_device())
    return model
