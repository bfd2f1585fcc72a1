"""``--format original``: the folder of the base model once more, with other values in its weights."""

import json
import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from vlmtune.apps.export.processor_files import image_differences, load_processor
from vlmtune.data import Processor
from vlmtune.data.processor_files import IMAGE_FILE
from vlmtune.layouts import Layout, Weight, open_weights, to_original
from vlmtune.layouts.view import TEMPLATE_FILE
from vlmtune.layouts.weights import INDEX_FILES
from vlmtune.models.lazy_model import LazyModel
from vlmtune.utils.errors import ConfigError, ModelError
from vlmtune.utils.guarded_copy import copy_inside
from vlmtune.utils.json_files import write_json
from vlmtune.utils.pretrained import find_folder, read_source_json
from vlmtune.utils.tensor_file import TensorLayout, write_tensors

logger = logging.getLogger(__name__)

_WEIGHTS = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack', '.gguf', '.onnx')
_NOT_COPIED = ('README.md', *INDEX_FILES)
_LIMITS = {
    'max_pixels': 'longest_edge',
    'min_pixels': 'shortest_edge',
}  # of preprocessor_config.json, in its older form


class Changed(NamedTuple):
    """What an export has besides the files of its base.

    Attributes:
        files: {name: text} of those that are written anew.
        note: sentences for the model card; '' where there is nothing to say.
    """

    files: Mapping[str, str] = {}
    note: str = ''


def changed_files(base: str, *, over: Path, rows: int | None = None) -> Changed:
    """The chat template and the image limits that a model was trained with, where they are not those of its base.

    Other image settings are warned of: they stand in config.json or in code, which are copied.

    Args:
        base: folder or hub id of the original.
        over: folder with the processor files that it was trained with.
        rows: of the trained embeddings if there are more than the base has.

    Raises:
        ConfigError: tokens were added; the files of the base cannot describe them.
    """
    processor, plain = load_processor(base, over=over), Processor(base)
    trained, own = processor.tokenizer, plain.tokenizer
    added = sorted(set(trained.get_vocab()) - set(own.get_vocab()))
    if added or rows:
        what = f'{len(added)} tokens were added (first: {added[0]})' if added else f'the embeddings grew to {rows} rows'
        way_out = 'write --format hf, or train without new tokens'
        if plain.family.model is not None:  # transformers has no such model
            way_out = 'use the adapter unmerged, or train without new tokens'
        raise ConfigError(
            f'--format original: {what}, but config.json and tokenizer of {base} are copied unchanged; {way_out}'
        )
    files, note = _changed_images(base, differences=image_differences(processor, plain))
    template = trained.chat_template
    if isinstance(template, str) and template != own.chat_template:
        logger.warning('trained with another chat template than that of %s: it is in %s', base, TEMPLATE_FILE)
        files[TEMPLATE_FILE] = template
    return Changed(files, note)


def _changed_images(base: str, *, differences: Mapping[str, tuple[Any, Any]]) -> tuple[dict[str, str], str]:
    """``preprocessor_config.json`` with the limits of the training if they are keys of it, and what to say."""
    changed = {name: trained for name, (trained, _) in differences.items()}
    files, note = {}, ''
    raw = read_source_json(base, IMAGE_FILE) or {}
    if 'size' in changed and _set_limits(raw, changed['size']):
        del changed['size']
        files[IMAGE_FILE] = json.dumps(raw, indent=2, ensure_ascii=False) + '\n'
        note = f' `{IMAGE_FILE}` is no copy: it has the image limits of the training.'
    if changed:
        own = {name: differences[name][1] for name in changed}
        told = f'trained with the image settings {changed}, but its files say {own}'
        told += ', as they are those of its base: set those of the training in what runs it'
        logger.warning('the model was %s', told)
        note += f' It was {told}.'
    return files, note


def _set_limits(raw: dict[str, Any], size: Mapping[str, Any]) -> bool:
    """Whether the limits are keys of a ``preprocessor_config.json``, by their older or newer names; they are set."""
    found = set()
    for old, new in _LIMITS.items():
        for place, key in ((raw, old), (raw.get('size'), new)):
            if isinstance(place, dict) and place.get(key) is not None and new in size:
                place[key] = size[new]
                found.add(new)
    return found == set(_LIMITS.values())


def write_original(
    model: LazyModel, folder: Path, *, base: str, layout: Layout, files: Mapping[str, str] | None = None
) -> None:
    """Write a model under the names, in the shapes and dtypes, and into the files of its base.

    All other files of the base are copied and never run, but for its README.md. Weights that training did not change
    have the very bits of the base. Files of torch.save become safetensors: nothing here writes pickles.

    Args:
        model: native, without adapters.
        folder: an empty one.
        base: folder or hub id of the original.
        layout: of the base.
        files: {name: text} of those that are not copied, see ``changed_files``.

    Raises:
        ModelError: the base is incomplete, or the model does not fit it.
        CheckpointError: the base holds a link that leads out of it, or what is no file.
    """
    source = find_folder(base)
    weights = open_weights(source)
    config = model.outline.config
    _check_complete(model, weights, layout=layout)
    _copy_files(source, folder)
    names = {weight.file: _safetensors_name(weight.file) for weight in weights.values()}
    originals = to_original(_Values(model.weights), source=weights, layout=layout, config=config)
    for file, group in groupby(originals, key=lambda pair: weights[pair[0]].file):
        inside = {name: TensorLayout(w.dtype, w.shape) for name, w in weights.items() if w.file == file}
        tensors = ((name, _unless_same(tensor, weights[name], dtype=model.dtype)) for name, tensor in group)
        write_tensors(folder / names[file], tensors, layout=inside, metadata=_metadata(file))
    _write_index(source, folder, names=names, weights=weights)
    for name, text in (files or {}).items():
        (folder / name).write_text(text, 'utf-8')


class _Values(Mapping[str, Tensor]):
    """The values of weights, each read when it is asked for."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights


# ---- files beside the weights


def _copy_files(source: Path, folder: Path) -> None:
    """Copy what is neither weights, hidden, nor the model card of the base."""
    for path in sorted(source.rglob('*')):
        name = path.relative_to(source)
        if path.is_dir() or name.name in _NOT_COPIED or path.suffix.lower() in _WEIGHTS:
            continue
        if any(part.startswith('.') or part == '__pycache__' for part in name.parts):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy_inside(path, folder / name, root=source)


# ---- weights


def _check_complete(model: LazyModel, weights: Mapping[str, Weight], *, layout: Layout) -> None:
    """Every weight of the model has a place in the original; a second name of a tied weight needs none."""
    names = layout.name_map(model.outline.config)
    written = {name for original in weights if (match := names.match(original)) for name in match.native}
    homes = {id(model.weights[name]) for name in written if name in model.weights}
    lost = sorted(name for name, weight in model.weights.items() if name not in written and id(weight) not in homes)
    if lost:
        why = '; embeddings and head were trained apart, but are one weight there' if 'lm_head' in lost[0] else ''
        raise ModelError(f'--format original: {layout.name} has no place for {lost[0]}{why}; write --format hf')


def _unless_same(tensor: Tensor, weight: Weight, *, dtype: torch.dtype) -> Tensor:
    """The weight of the base if all that the model lost of it is the precision of its own dtype."""
    if dtype == weight.dtype:
        return tensor
    base = weight.read()
    return base if torch.equal(base.to(dtype).to(weight.dtype), tensor) else tensor


def _safetensors_name(file: Path) -> str:
    if file.suffix == '.safetensors':
        return file.name
    return file.name.replace('pytorch_model', 'model', 1).removesuffix(file.suffix) + '.safetensors'


def _metadata(file: Path) -> dict[str, str]:
    if file.suffix == '.safetensors':
        with safe_open(file, 'pt') as opened:
            return opened.metadata() or {}
    return {'format': 'pt'}


def _write_index(source: Path, folder: Path, *, names: Mapping[Path, str], weights: Mapping[str, Weight]) -> None:
    """The index of several files: that of the base, or one of the same form where the base has files of torch.save."""
    if (source / INDEX_FILES[0]).is_file():
        copy_inside(source / INDEX_FILES[0], folder / INDEX_FILES[0], root=source)
    elif len(names) > 1:
        size = sum(weight.dtype.itemsize * torch.Size(weight.shape).numel() for weight in weights.values())
        places = {name: names[weight.file] for name, weight in sorted(weights.items())}
        index = {'metadata': {'total_size': size}, 'weight_map': places}
        write_json(folder / INDEX_FILES[0], index)
