"""The weights of a LLaVA from parts, under XTuner's names: ``llm.``, ``visual_encoder.``, ``projector.``

What the language model and the vision encoder are called behind these is what their own checkpoints call them, so that
adapters of XTuner, which it trains on the original code, fit them.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig

from vlmtune.layouts.weights import Weight, open_file, open_weights
from vlmtune.utils.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX, adapter_settings, adapter_weights
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.pretrained import find_folder, read_source_json
from vlmtune.utils.safe_torch import check_legacy, find_legacy_file

_FILES = ('*.json', '*.safetensors', 'pytorch_model*.bin')
_EMBEDDINGS = ('model.embed_tokens', 'lm_head', 'model.tok_embeddings', 'output')
_OURS, _LAST = 'model.safetensors', 'last_checkpoint'
_ADAPTERS = {'llm_adapter': 'llm.', 'visual_encoder_adapter': 'visual_encoder.'}
# Beginnings of a projector's names: ours, those of official LLaVA's mm_projector.bin, of XTuner's folder and file.
_PROJECTORS = {
    'model.multi_modal_projector.linear_1.': 'projector.model.0.',
    'model.multi_modal_projector.linear_2.': 'projector.model.2.',
    'model.mm_projector.': 'projector.model.',
}
_PROJECTOR = tuple(f'projector.model.{layer}.{leaf}' for layer in (0, 2) for leaf in ('weight', 'bias'))
_UNREAD = ('use_dora', 'fan_in_fan_out', 'rank_pattern', 'alpha_pattern', 'modules_to_save', 'bias')  # of PEFT


@dataclass(frozen=True)
class Pretrained:
    """What ``pretrained_pth`` names.

    Attributes:
        weights: of whole tensors.
        adapters: beginning of the names of a part -> the folder of its adapter.
    """

    weights: Mapping[str, Weight]
    adapters: Mapping[str, Path] = field(default_factory=dict)


def open_parts(folder: Path) -> dict[str, Weight]:
    """All weights of a LLaVA from parts.

    Args:
        folder: of ``llava_parts.find_source``; its config.json names the parts.

    Raises:
        ModelError: a part has no weights, or lacks a file.
        CheckpointError: the pretrained projector or an adapter cannot be read, or does not fit.
    """
    raw = json.loads((folder / 'config.json').read_text('utf-8'))
    parts, config = raw['parts'], LlavaConfig.from_dict(raw['llava'])
    text: Any = config.text_config
    llm = open_weights(find_folder(parts['llm_name_or_path'], patterns=_FILES))
    tower = tower_names(open_weights(find_folder(parts['visual_encoder_name_or_path'], patterns=_FILES)))
    weights = {**{f'llm.{name}': weight for name, weight in llm.items()}, **tower}
    if parts['pretrained_pth'] is None:
        weights |= _new_projector(config, folder)
    else:
        pretrained = open_pretrained(Path(parts['pretrained_pth']))
        weights |= pretrained.weights
        for part, adapter in pretrained.adapters.items():
            weights |= adapted_weights(weights, adapter, part=part)
    for name in (f'llm.{name}.weight' for name in _EMBEDDINGS):
        if name in weights and weights[name].shape[0] < text.vocab_size:
            weights[name] = _grown(weights[name], rows=text.vocab_size)
    return weights


def tower_names(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """A vision encoder that was saved alone may or may not say ``vision_model.`` before each name."""
    is_bare = not any(name.startswith('vision_model.') for name in weights)
    return {f'visual_encoder.{"vision_model." if is_bare else ""}{name}': weight for name, weight in weights.items()}


def _new_projector(config: Any, folder: Path) -> dict[str, Weight]:
    """Values as torch gives new linear layers, the same ones every time: no checkpoint holds what does not train."""
    random = torch.Generator().manual_seed(0)
    wide, text = config.vision_config.hidden_size, config.text_config.hidden_size
    tensors = {}
    for layer, fan_in in ((0, wide), (2, text)):
        for leaf, shape in (('weight', (text, fan_in)), ('bias', (text,))):
            bound = 1 / math.sqrt(fan_in)
            tensors[f'projector.model.{layer}.{leaf}'] = torch.empty(shape).uniform_(-bound, bound, generator=random)
    return {
        name: Weight(tuple(tensor.shape), tensor.dtype, folder / 'config.json', partial(tensors.__getitem__, name))
        for name, tensor in tensors.items()
    }


def _grown(weight: Weight, *, rows: int) -> Weight:
    """With more rows, each the mean of those that are there: as likely to be said as an average token."""

    def read() -> Tensor:
        old = weight.read()
        mean = old.float().mean(0, keepdim=True).to(old.dtype)
        return torch.cat([old, mean.expand(rows - old.shape[0], -1)])

    return replace(weight, shape=(rows, *weight.shape[1:]), read=read)


# ---- what pretrained_pth names


def check_pretrained(path: str) -> None:
    """Look at what ``pretrained_pth`` names without reading weights.

    Raises:
        CheckpointError: it is missing, of an unknown kind, or could run code.
    """
    place = _checkpoint_in(Path(path))
    if not (place / 'projector').is_dir() and not (place / 'config.json').is_file() and not (place / _OURS).is_file():
        check_legacy(_legacy_file(place))


def _checkpoint_in(path: Path) -> Path:
    """The newest checkpoint of a work dir of ours; any other path as it is."""
    pointer = path / _LAST
    return path / Path(pointer.read_text('utf-8').strip()).name if pointer.is_file() else path


def open_pretrained(path: Path) -> Pretrained:
    """The projector, and what else XTuner saved beside it.

    Args:
        path: ``iter_N.pth`` of ours, or the work dir with it; a .pth of XTuner or DeepSpeed's folder of one;
            XTuner's folder ``projector``; the folder above it, with ``llm_adapter``, ``visual_encoder_adapter`` or
            ``visual_encoder`` if they were trained; mm_projector.bin of official LLaVA.

    Raises:
        CheckpointError: it cannot be read, holds LoRA layers of unknown alpha, or has no projector.
    """
    path, adapters = _checkpoint_in(path), {}
    if (path / 'projector').is_dir():
        found = _projector_folder(path / 'projector')
        adapters = {part: path / name for name, part in _ADAPTERS.items() if (path / name).is_dir()}
        if (path / 'visual_encoder').is_dir():
            found |= tower_names(open_weights(path / 'visual_encoder'))
        if (path / 'config.json').is_file():
            found |= {f'llm.{name}': weight for name, weight in open_weights(path).items()}
    elif (path / 'config.json').is_file():
        found = _projector_folder(path)
    else:
        file = path / _OURS if (path / _OURS).is_file() else _legacy_file(path)
        found = {_projector_name(name): weight for name, weight in open_file(file).items()}
    if adapted := sorted(name for name in found if '.lora_' in name):
        raise CheckpointError(
            f'pretrained_pth: {path} holds LoRA layers (first: {adapted[0]}) without their alpha; write it by '
            'pth_to_hf of the program that made it: what XTuner writes is named here, what vlmtune writes as '
            'pretrained_model_name_or_path'
        )
    parts = ('projector.', 'llm.', 'visual_encoder.')
    if foreign := sorted(name for name in found if not name.startswith(parts)):
        raise CheckpointError(
            f'pretrained_pth: {path} holds {foreign[0]}, expected a projector; what trained more of the model is '
            'written by pth_to_hf and named as pretrained_model_name_or_path'
        )
    if missing := [name for name in _PROJECTOR if name not in found]:
        raise CheckpointError(f'pretrained_pth: {path} holds no {missing[0]}; expected {", ".join(_PROJECTOR)}')
    return Pretrained(found, adapters)


def _legacy_file(path: Path) -> Path:
    file = find_legacy_file(path) if path.exists() else None
    if file is None:
        what = 'holds no projector' if path.exists() else 'does not exist'
        raise CheckpointError(
            f'pretrained_pth: {path.absolute()} {what}; expected iter_N.pth of vlmtune, a .pth of XTuner, its folder '
            'projector, or the folder above it'
        )
    return file


def _projector_name(name: str) -> str:
    name = name.removeprefix('module.')
    for theirs, ours in _PROJECTORS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _projector_folder(folder: Path) -> dict[str, Weight]:
    config = read_source_json(str(folder), 'config.json') or {}
    if config.get('model_type') not in (None, 'projector'):
        raise CheckpointError(
            f'pretrained_pth: {folder} is a {config["model_type"]}, no projector; a whole LLaVA is named as '
            'pretrained_model_name_or_path, in place of its parts'
        )
    expected = dict(model_type='projector', depth=2, hidden_act='gelu', bias=True)
    for key, value in expected.items():
        if config.get(key, None if key == 'model_type' else value) != value:
            raise CheckpointError(
                f'pretrained_pth: {folder / "config.json"} has {key}={config.get(key)!r}, expected {value!r}: LLaVA '
                'has projectors of two layers with GELU in between'
            )
    return {f'projector.{name}': weight for name, weight in open_weights(folder).items()}


# ---- adapters of PEFT


def adapted_weights(weights: Mapping[str, Weight], folder: Path, *, part: str) -> Iterator[tuple[str, Weight]]:
    """The weights of a part that an adapter of PEFT changes, changed when they are read.

    Args:
        weights: of the model; those of the part begin with its name.
        folder: of the adapter.
        part: beginning of the names of a part.

    Raises:
        CheckpointError: the adapter cannot be read, is not of plain LoRA, or does not fit.
    """
    settings = adapter_settings(folder)
    for name in _UNREAD:
        if (value := settings.get(name)) and value != 'none':
            raise CheckpointError(f'{folder / ADAPTER_CONFIG}: {name}={value!r} is not read; merge it with PEFT')
    file = folder / 'adapter_model.bin'
    file = file if file.is_file() and not (folder / ADAPTER_WEIGHTS).is_file() else adapter_weights(folder)
    updates = {name.removeprefix(PEFT_PREFIX): weight for name, weight in open_file(file).items()}
    rank, alpha = settings['r'], settings['lora_alpha']
    scale = alpha / (math.sqrt(rank) if settings.get('use_rslora') else rank)
    changed = {}
    for name in updates:
        layer, _, kind = name.partition('.lora_')
        place, down, up = f'{part}{layer}.weight', f'{layer}.lora_A.weight', f'{layer}.lora_B.weight'
        if kind not in ('A.weight', 'B.weight') or place not in weights or down not in updates or up not in updates:
            raise CheckpointError(f'{file} holds {name}, for which {part.removesuffix(".")} has no place')
        changed[place] = _merged(weights[place], updates[down], updates[up], scale=scale, file=file)
    yield from changed.items()


def _merged(weight: Weight, down: Weight, up: Weight, *, scale: float, file: Path) -> Weight:
    if (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
        raise CheckpointError(f'{file}: updates of {up.shape} x {down.shape} do not fit a weight of {weight.shape}')

    def read() -> Tensor:
        update = up.read().float() @ down.read().float()
        return (weight.read().float() + scale * update).to(weight.dtype)

    return replace(weight, read=read)
