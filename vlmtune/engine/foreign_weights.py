"""Finds out what ``load_from`` names, opens it, and gives every weight in it the name that it has in the model here."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from vlmtune.engine.checkpoint import WEIGHTS_FILE
from vlmtune.engine.foreign_names import adapter_name, original_names, placed
from vlmtune.engine.manifest import MANIFEST, verify
from vlmtune.layouts import Weight, find_layout, open_weights, read_config
from vlmtune.layouts.weights import open_file
from vlmtune.models import SupervisedFinetune, load_model
from vlmtune.utils.adapter_folder import ADAPTER_CONFIG, adapter_settings, adapter_weights
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.json_files import read_object
from vlmtune.utils.safe_torch import check_legacy, find_legacy_file

Weights: TypeAlias = Mapping[str, Weight]
Kind: TypeAlias = Literal['checkpoint', 'adapter', 'model', 'legacy']

_BESIDE_ADAPTER = 'vpm_resampler_embedtokens.pt'  # what MiniCPM-V's fine-tuning code trains besides LoRA
_PLAIN_NAME = re.compile(r'[\w.]+')
_LEGACY = ('.pth', '.pt', '.bin', '.ckpt')


@dataclass(frozen=True)
class ForeignWeights:
    """What is there to load.

    Attributes:
        path: what the user named.
        weights: by their names in the model here.
        origins: name in the model -> name in the file.
        lost: names in the file that have no place in the model.
        is_ours: a checkpoint of vlmtune.
        remark: what the log has to say about it.
    """

    path: Path
    weights: Weights
    origins: Mapping[str, str]
    lost: list[str] = field(default_factory=list)
    is_ours: bool = False
    remark: str = ''


def kind_of(path: Path) -> Kind:
    """What a path holds.

    Raises:
        CheckpointError: nothing is there, or nothing that is known.
    """
    if path.is_dir():
        for file, kind in ((MANIFEST, 'checkpoint'), (ADAPTER_CONFIG, 'adapter'), ('config.json', 'model')):
            if (path / file).is_file():
                return kind  # type: ignore[return-value]
        if find_legacy_file(path) is not None:
            return 'legacy'
    elif path.is_file() and path.suffix.lower() in _LEGACY:
        return 'legacy'
    what = 'holds nothing that can be loaded' if path.exists() else 'does not exist'
    raise CheckpointError(
        f'load_from: {path.absolute()} {what}; expected iter_N.pth of vlmtune, the folder of a PEFT adapter or of a '
        'Hugging Face model, or a checkpoint of mmengine or XTuner (.pth, or a folder of DeepSpeed)'
    )


def check_loadable(path: str | Path) -> None:
    """Tell whether ``load_from`` names something that can be read, without reading weights or asking for a model.

    Raises:
        CheckpointError: it is missing, broken, of an unknown kind, or could run code.
        ModelError: a file of a model is missing, or one of weights broken.
    """
    path = Path(path).expanduser()
    kind = kind_of(path)
    if kind == 'checkpoint':
        verify(path, hashes=False)
    elif kind == 'adapter':
        adapter_settings(path)
        open_file(adapter_weights(path))
        if (path / _BESIDE_ADAPTER).is_file():
            check_legacy(path / _BESIDE_ADAPTER)
    elif kind == 'model':
        read_object(path / 'config.json')
        if find_layout(str(path)) is not None:
            open_weights(path)
        elif not any(path.glob('*.safetensors')):
            raise CheckpointError(
                f'{path} has no *.safetensors; models in other formats are not read: convert it first'
            )
    elif (file := find_legacy_file(path)) is not None:
        check_legacy(file)


def open_source(path: Path, *, model: SupervisedFinetune) -> ForeignWeights:
    """The weights of a path under the names of the model; only what has to be is read.

    Raises:
        CheckpointError: it cannot be read, or was made with other LoRA settings.
        ModelError: the Hugging Face model, or a file of weights, cannot be read.
    """
    check_loadable(path)
    return _OPENERS[kind_of(path)](path, model)


# ---- ours


def _open_checkpoint(path: Path, model: SupervisedFinetune) -> ForeignWeights:
    manifest = verify(path)
    if WEIGHTS_FILE not in manifest['files']:
        raise CheckpointError(f'{path} has no {WEIGHTS_FILE}')
    source = _placed(path, open_file(path / WEIGHTS_FILE), model=model, is_ours=True)
    if ADAPTER_CONFIG in manifest['files']:
        _check_lora(source, adapter_settings(path), model=model)
    return source


def _placed(path: Path, weights: Weights, *, model: SupervisedFinetune, is_ours: bool = False) -> ForeignWeights:
    places = _places(model)
    lost = sorted(name for name in weights if name not in places)
    origins = {places[name]: name for name in weights if name in places}
    return ForeignWeights(path, {ours: weights[name] for ours, name in origins.items()}, origins, lost, is_ours=is_ours)


def _renamed(path: Path, found: Weights, *, model: SupervisedFinetune) -> ForeignWeights:
    """Weights under names of other programs."""
    places, originals = _places(model), original_names(model.family, model.model.config)
    weights: dict[str, Weight] = {}
    origins: dict[str, str] = {}
    lost = []
    for name, weight in found.items():
        ours = placed(adapter_name(name), weight, places=places, originals=originals)
        lost += [] if ours else [name]
        for place, part in ours:
            weights.setdefault(place, part)
            origins.setdefault(place, name)
    return ForeignWeights(path, weights, origins, sorted(lost))


def _places(model: SupervisedFinetune) -> dict[str, str]:
    """Every name by which a weight can be known -> its name here: tied weights have two, adapted layers are wrapped."""
    first: dict[int, str] = {}
    places: dict[str, str] = {}
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        places[name] = places[name.replace('.base_layer.', '.')] = first.setdefault(id(parameter), name)
    return places


# ---- PEFT


def _open_adapter(path: Path, model: SupervisedFinetune) -> ForeignWeights:
    found = open_file(adapter_weights(path))
    if (path / _BESIDE_ADAPTER).is_file():
        found |= open_file(path / _BESIDE_ADAPTER)
    source = _renamed(path, found, model=model)
    _check_lora(source, adapter_settings(path), model=model)
    return source


def _check_lora(source: ForeignWeights, settings: Mapping[str, Any], *, model: SupervisedFinetune) -> None:
    """Rank and alpha of every adapted layer are those of this run, and so is the kind of update."""
    ours, path = model.lora_config, source.path
    layers = {name.partition('.lora_A.')[0]: name for name in source.weights if '.lora_A.' in name}
    if not layers or ours is None:
        return  # that there is no place for them is said elsewhere
    for kind in ('use_dora', 'use_rslora'):
        if bool(settings.get(kind)) != getattr(ours, kind):
            raise CheckpointError(f'{path} has {kind}={bool(settings.get(kind))}, this run {getattr(ours, kind)}')
    for layer, name in layers.items():
        here, rank = _lora_here(model, layer), source.weights[name].shape[0]
        there = adapter_name(source.origins[name]).partition('.lora_A.')[0]
        if here is not None and (rank, alpha := _alpha(settings, layer, there, ours)) != here:
            raise CheckpointError(
                f'{path} has rank {rank} and alpha {alpha} at {layer}, this run rank {here[0]} and alpha {here[1]}; '
                'set r and alpha of lora to those of the adapter'
            )


def _lora_here(model: SupervisedFinetune, layer: str) -> tuple[int, float] | None:
    try:
        module: Any = model.model.get_submodule(layer)
        return module.r['default'], module.lora_alpha['default']
    except (AttributeError, KeyError, TypeError):
        return None


def _alpha(settings: Mapping[str, Any], layer: str, there: str, ours: Any) -> Any:
    """The alpha of a layer, which is called ``there`` in the adapter.

    Patterns are regular expressions of a stranger, so they are compared and never run.
    """
    for pattern, alpha in (settings.get('alpha_pattern') or {}).items():
        if pattern in (ours.alpha_pattern or {}):
            if re.fullmatch(pattern, layer):  # it is one that we made
                return alpha
        elif there == pattern or there.endswith(f'.{pattern}'):
            return alpha
        elif not _PLAIN_NAME.fullmatch(pattern):
            return f'given by {pattern[:60]!r}, which cannot be compared'
    return settings['lora_alpha']


# ---- Hugging Face models


def _open_model(path: Path, model: SupervisedFinetune) -> ForeignWeights:
    config = read_config(str(path))
    if config.model_type != model.model.config.model_type:
        raise CheckpointError(
            f'{path} is a model of type {config.model_type}, this run trains a {model.model.config.model_type}'
        )
    own = config.dtype if isinstance(config.dtype, torch.dtype) and model.dtype != torch.float32 else torch.float32
    loaded, _ = load_model(str(path), dtype=own, refuse_unknown=True)
    found = {
        name: Weight(tuple(parameter.shape), parameter.dtype, path, parameter.detach)
        for name, parameter in loaded.named_parameters()
    }
    return _placed(path, found, model=model)


# ---- mmengine, XTuner, DeepSpeed


def _open_legacy(path: Path, model: SupervisedFinetune) -> ForeignWeights:
    file = find_legacy_file(path)
    assert file is not None
    source = _renamed(path, open_file(file), model=model)
    if not any('.lora_' in name for name in source.weights):
        return source
    return replace(source, remark=' (it does not say the alpha of its LoRA layers: that of the config is used)')


_OPENERS: dict[Kind, Callable[[Path, SupervisedFinetune], ForeignWeights]] = {
    'checkpoint': _open_checkpoint,
    'adapter': _open_adapter,
    'model': _open_model,
    'legacy': _open_legacy,
}
