"""``--format original``: the folder of the base model once more, with other values in its weights."""

import json
import logging
import shutil
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from vlmtune.apps.export import load_processor
from vlmtune.data import Processor
from vlmtune.layouts import Layout, Weight, open_weights, to_original
from vlmtune.layouts.view import TEMPLATE_FILE
from vlmtune.layouts.weights import INDEX_FILES
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError
from vlmtune.utils.pretrained import find_folder
from vlmtune.utils.tensor_file import TensorLayout, write_tensors

logger = logging.getLogger(__name__)

_WEIGHTS = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack', '.gguf', '.onnx')
_NOT_COPIED = ('README.md', *INDEX_FILES)


def template_to_write(base: str, *, over: Path, rows: int | None = None) -> str | None:
    """The chat template that a model was trained with, if it is not that of its base; else None.

    Other image settings than those of the base are warned of: the export cannot say them.

    Args:
        base: folder or hub id of the original.
        over: folder with the processor files that it was trained with.
        rows: of the trained embeddings if there are more than the base has.

    Raises:
        ConfigError: tokens were added; the files of the base cannot describe them.
    """
    processor, plain = load_processor(base, over=over), Processor(base)
    _tell_image_settings(base, trained=processor, own=plain)
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
    template = trained.chat_template
    return template if isinstance(template, str) and template != own.chat_template else None


def _tell_image_settings(base: str, *, trained: Processor, own: Processor) -> None:
    """Warn where images were cut or scaled otherwise in training than the files of the base say."""
    if trained.image_processor is None or own.image_processor is None:
        return
    here, there = trained.image_processor.to_dict(), own.image_processor.to_dict()
    changed = {name: here[name] for name in sorted(set(here) & set(there)) if here[name] != there[name]}
    if changed:
        logger.warning(
            'trained with the image settings %s, but the files of %s are copied unchanged and say %s: set those of the '
            'training in what runs the model',
            changed,
            base,
            {name: there[name] for name in changed},
        )


def write_original(
    model: PreTrainedModel, folder: Path, *, base: str, layout: Layout, template: str | None = None
) -> None:
    """Write a model under the names, in the shapes and dtypes, and into the files of its base.

    All other files of the base are copied and never run, but for its README.md. Weights that training did not change
    have the very bits of the base. Files of torch.save become safetensors: nothing here writes pickles.

    Args:
        model: native, without adapters.
        folder: an empty one.
        base: folder or hub id of the original.
        layout: of the base.
        template: chat template to write beside the files of the base, see ``template_to_write``.

    Raises:
        ModelError: the base is incomplete, or the model does not fit it.
        CheckpointError: the base holds a link that leads out of it, or what is no file.
    """
    source = find_folder(base)
    weights = open_weights(source)
    state = model.state_dict()
    _check_complete(model, state, weights, layout=layout)
    _copy_files(source, folder)
    files = list(dict.fromkeys(weight.file for weight in weights.values()))
    names = {file: _safetensors_name(file) for file in files}
    originals = to_original(state, source=weights, layout=layout, config=model.config)
    for file, group in groupby(originals, key=lambda pair: weights[pair[0]].file):
        inside = {name: TensorLayout(w.dtype, w.shape) for name, w in weights.items() if w.file == file}
        tensors = ((name, _unless_same(tensor, weights[name], dtype=model.dtype)) for name, tensor in group)
        write_tensors(folder / names[file], tensors, layout=inside, metadata=_metadata(file))
    _write_index(source, folder, names=names, weights=weights)
    if template is not None:
        logger.warning('trained with another chat template than that of %s: it is in %s', base, TEMPLATE_FILE)
        (folder / TEMPLATE_FILE).write_text(template, 'utf-8')


# ---- files beside the weights


def _copy_files(source: Path, folder: Path) -> None:
    """Copy what is neither weights, hidden, nor the model card of the base."""
    roots = [source.resolve()]
    if source.parent.name == 'snapshots':  # the hub's cache: files are links into a folder beside the snapshots
        roots.append(source.resolve().parents[1])
    for path in sorted(source.rglob('*')):
        name = path.relative_to(source)
        if path.is_dir() or name.name in _NOT_COPIED or path.suffix.lower() in _WEIGHTS:
            continue
        if any(part.startswith('.') or part == '__pycache__' for part in name.parts):
            continue
        if not path.is_file():
            raise CheckpointError(f'{path} is no file, or a link to none; remove it')
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise CheckpointError(f'{path} is a link that leads out of {source}; put the file itself there')
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


# ---- weights


def _check_complete(
    model: PreTrainedModel, state: Mapping[str, Tensor], weights: Mapping[str, Weight], *, layout: Layout
) -> None:
    """Every weight of the model has a place in the original; a second name of a tied weight needs none."""
    names = layout.name_map(model.config)
    written = {name for original in weights if (match := names.match(original)) for name in match.native}
    homes = {state[name].data_ptr() for name in written if name in state}
    lost = sorted(name for name in set(state) - written if state[name].data_ptr() not in homes)
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
        shutil.copyfile(source / INDEX_FILES[0], folder / INDEX_FILES[0])
    elif len(names) > 1:
        size = sum(weight.dtype.itemsize * torch.Size(weight.shape).numel() for weight in weights.values())
        places = {name: names[weight.file] for name, weight in sorted(weights.items())}
        index = {'metadata': {'total_size': size}, 'weight_map': places}
        (folder / INDEX_FILES[0]).write_text(json.dumps(index, indent=2) + '\n', 'utf-8')
