"""``vlmtune import-config``: an XTuner 0.1 config of a LLaVA or an InternVL as a config of ours.

The file is parsed and never run: classes and functions are known by the names they are written with.
"""

import ast
import logging
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.config import config_mistakes, load_config
from vlmtune.config.unrun import Name, read_unrun
from vlmtune.recipes import resolve_config
from vlmtune.utils.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

_SAME = (
    'accumulative_counts', 'dataloader_num_workers', 'max_epochs', 'lr', 'betas',
    'weight_decay', 'max_norm', 'warmup_ratio', 'save_total_limit',
)  # fmt: skip
_FLOATS = ('weight_decay', 'max_norm')
_COUNTS = ('batch_size', 'accumulative_counts', 'max_length')
_TEMPLATES = dict(vicuna='vicuna', internlm2_chat='internlm2_chat', llama3_chat='llama3_chat', qwen_chat='chatml')
_IMAGE_TOKENS = {'clip-vit-large-patch14-336': 576, 'clip-vit-large-patch14': 256, 'siglip-so400m-patch14-384': 729}
_TILES = 12
_BASE = {'LLaVAModel': 'llava_internlm2_1_8b_qlora_mix665k', 'InternVL_V1_5': 'internvl2_2b_lora_foodie'}


class Data(NamedTuple):
    """One data set, under XTuner's names."""

    data_path: Any
    image_folder: Any
    repeat_times: Any = 1


@dataclass
class Imported:
    """Settings under our names, and what a reader should know about them."""

    base: str  # the recipe of ours that has the form
    settings: dict[str, Any] = field(default_factory=dict)
    data: list[Data] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_config(source: str, output: str) -> None:
    """Write the config ``output`` that trains what the XTuner config ``source`` trains.

    Raises:
        ConfigError: ``source`` is none of a LLaVA or an InternVL, or holds what has no place; ``output`` exists.
    """
    target = Path(output).expanduser()
    if target.suffix != '.py' or target.exists():
        raise ConfigError(f'{target}: expected the name of a new .py file')
    path = Path(source).expanduser()
    try:
        values = read_unrun(path.read_bytes(), name=str(path))
    except OSError as error:
        raise ConfigError(f'{path} cannot be read: {error.strerror}; expected an XTuner config') from error
    imported = _convert(values, source=source)
    text = _rewrite(imported, name=target.stem, source=Path(source).name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, 'utf-8')
    try:
        load_config(target, check=config_mistakes)
    except ConfigError:
        target.unlink()
        raise
    for note in imported.notes:
        logger.warning('%s', note)
    logger.info('wrote %s, in the form of %s; look at it, then: vlmtune check-data %s', target, imported.base, target)


# ---- from its names to ours


def _convert(values: Mapping[str, Any], *, source: str) -> Imported:
    model = values.get('model')
    kind = model.get('type') if isinstance(model, Mapping) else None
    kind = kind.last if isinstance(kind, Name) else None
    if not isinstance(model, Mapping) or kind not in _BASE:
        raise ConfigError(
            f'{source}: model.type is {one_line(str(kind))}; expected {" or ".join(_BASE)} of XTuner 0.1. '
            'docs/coming_from.md says how other configs correspond'
        )
    found = Imported(_BASE[kind])
    _check_numbers(values, source=source)
    found.settings.update((name, values[name]) for name in _SAME if name in values)
    found.settings.update(pack_to_max_length=False, batch_size=values.get('batch_size', 1))
    found.settings.update(_parts(model))
    if kind == 'LLaVAModel':
        _take_llava(values, found, source=source)
    else:
        found.settings['pretrained_model_name_or_path'] = model.get('model_path', values.get('path'))
        found.settings.update(max_length=values.get('max_length', 8192), max_patches=_TILES)
        _take_internvl_data(values, found, source=source)
        found.notes.append(
            f'max_patches is {_TILES}, as in config.json of the InternVL2 models; fewer tiles are faster'
        )
    _take_evaluation(values, found)
    _take_dtype(values, found)
    if len(found.data) == 1 and found.data[0].repeat_times == 1:
        found.settings.update(data_path=found.data[0].data_path, image_folder=found.data[0].image_folder)
    for name, value in [*found.settings.items(), *(pair for one in found.data for pair in one._asdict().items())]:
        if not _is_plain(value):
            raise ConfigError(f'{source}: {name} is {one_line(str(value))}; expected a plain value, write it out')
        if name in _FLOATS and isinstance(value, int):
            found.settings[name] = float(value)
    found.notes.append(
        'packing is off, as in XTuner; pack_to_max_length=True with batch_size=1 is faster: docs/packing.md'
    )
    return found


def _check_numbers(values: Mapping[str, Any], *, source: str) -> None:
    for name in _COUNTS:
        value = values.get(name, 1)
        if type(value) is not int or value < 1:
            raise ConfigError(f'{source}: {name} is {one_line(str(value))}; expected a positive integer, write it out')


def _is_plain(value: Any) -> bool:
    """Whether it is what a setting may be: nothing that was left as text, and no dict but our own."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(type(key) is str and key.isidentifier() and _is_plain(inner) for key, inner in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _parts(model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What learns, and how."""
    lora, vision_lora = model.get('llm_lora'), model.get('visual_encoder_lora')
    vision: Any = 'frozen' if model.get('freeze_visual_encoder') else 'full'
    if isinstance(vision_lora, Mapping):
        vision = dict(mode='lora', r=vision_lora.get('r', 8), alpha=vision_lora.get('lora_alpha', 8))
    llm = 'lora' if isinstance(lora, Mapping) else 'frozen' if model.get('freeze_llm') else 'full'
    yield 'tune', dict(vision_encoder=vision, projector='full', llm=llm)
    if isinstance(lora, Mapping):
        yield 'lora_r', lora.get('r', 8)
        yield 'lora_alpha', lora.get('lora_alpha', 8)
        yield 'lora_dropout', lora.get('lora_dropout', 0.0)
    loader = model.get('llm')
    quantized = (loader or {}).get('quantization_config') if isinstance(loader, Mapping) else None
    quantized = quantized if isinstance(quantized, Mapping) else {}
    is_4bit = quantized.get('load_in_4bit') or model.get('quantization_llm')
    yield 'quantization', 'nf4' if is_4bit else 'int8' if quantized.get('load_in_8bit') else None


def _take_llava(values: Mapping[str, Any], found: Imported, *, source: str) -> None:
    for name in ('llm_name_or_path', 'visual_encoder_name_or_path'):
        found.settings[name] = values.get(name)
    found.settings['pretrained_pth'] = values.get('pretrained_pth')
    dataset = _train_dataset(values)
    members = dataset.get('datasets', [dataset])
    if not isinstance(members, list) or not all(isinstance(one, Mapping) and 'image_folder' in one for one in members):
        raise ConfigError(
            f'{source}: train_dataloader.dataset: expected one LLaVADataset, or a ConcatDataset of several'
        )
    squares = [bool(one.get('pad_image_to_square')) for one in members]
    if len(set(squares)) != 1:
        raise ConfigError(f'{source}: pad_image_to_square is {squares} in its data sets; expected the same in all')
    found.settings['pad_image_to_square'] = squares[0]
    for number, one in enumerate(members):
        found.data.append(Data(one.get('data_path'), one['image_folder']))
        found.notes += _unlike(one, where=f'data set {number}' if len(members) > 1 else 'train_dataloader.dataset')
    template = values.get('prompt_template')
    known = _TEMPLATES.get(template.last) if isinstance(template, Name) else None
    if known is None:
        found.notes.append(f'prompt_template {template} has no counterpart: choose one of vlmtune/data/templates.py')
    found.settings['prompt_template'] = known
    tower = str(values.get('visual_encoder_name_or_path')).rpartition('/')[2]
    tokens = _IMAGE_TOKENS.get(tower, 576)
    found.settings['max_length'] = int(values.get('max_length', 2048)) + tokens
    found.notes.append(f'max_length counts the {tokens} tokens of an image here: it grew by as many')


def _train_dataset(values: Mapping[str, Any]) -> Mapping[str, Any]:
    loader = values.get('train_dataloader')
    dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
    return dataset if isinstance(dataset, Mapping) else {}


def _unlike(dataset: Mapping[str, Any], *, where: str) -> Iterator[str]:
    """What of a data set has no counterpart."""
    kind, map_fn, most = dataset.get('type'), dataset.get('dataset_map_fn'), dataset.get('max_dataset_length')
    if not str(kind).endswith('LLaVADataset'):
        yield f'{where} is a {one_line(str(kind))}, which makes rows of its own: write a map function (docs/extend.md)'
    if not str(map_fn).endswith('llava_map_fn'):
        yield f'{where}: dataset_map_fn is {one_line(str(map_fn))}: write that function anew (docs/extend.md)'
    if most is not None:
        yield f'{where}: max_dataset_length={most} is not taken; repeats=[...] of a MixedDataset takes shares'


def _take_internvl_data(values: Mapping[str, Any], found: Imported, *, source: str) -> None:
    dataset = _train_dataset(values)
    columns = [
        dataset.get('data_paths', values.get('data_path')),
        dataset.get('image_folders', values.get('image_folder')),
        dataset.get('repeat_times', 1),
    ]
    lists = [column if isinstance(column, list) else [column] for column in columns]
    if len(lists[2]) == 1:
        lists[2] = lists[2] * len(lists[0])
    counts = [len(column) for column in lists]
    if len(set(counts)) > 1 or not counts[0]:
        raise ConfigError(f'{source}: {counts} data_paths, image_folders and repeat_times; expected as many of each')
    found.data += map(Data, *lists)


def _take_evaluation(values: Mapping[str, Any], found: Imported) -> None:
    counts = int(values.get('accumulative_counts', 1))
    for name in ('save_steps', 'evaluation_freq'):
        if isinstance(values.get(name), int):
            found.settings[name] = max(1, values[name] // counts)
    if counts > 1:
        found.notes.append(f'save_steps and evaluation_freq count optimizer steps here: divided by {counts}')
    inputs, images = values.get('evaluation_inputs', []), values.get('evaluation_images')
    is_url = isinstance(images, str) and '://' in images
    if is_url:
        found.notes.append(f'evaluation_images is a URL, which is not read: download {images} and name the file')
    elif images:
        found.settings['evaluation_images'] = [images] * len(inputs) if isinstance(images, str) else images
    if is_url or not images:
        inputs, found.settings['evaluation_images'] = [], []
    found.settings['evaluation_inputs'] = inputs
    system = values.get('SYSTEM')
    found.settings['SYSTEM'] = system if type(system) is str and system else None


def _take_dtype(values: Mapping[str, Any], found: Imported) -> None:
    wrapper = values.get('optim_wrapper')
    dtype = wrapper.get('dtype') if isinstance(wrapper, Mapping) else None
    found.settings['dtype'] = 'bfloat16' if dtype != 'float16' else 'float16'
    if dtype == 'float16':
        found.notes.append("dtype='float16' as in XTuner; 'bfloat16' needs no loss scale, on Ampere GPUs and newer")


# ---- writing


def _rewrite(imported: Imported, *, name: str, source: str) -> str:
    """The recipe of ours with the imported settings in its Part 1.

    Raises:
        ConfigError: the recipe lacks one of them.
    """
    text = resolve_config(imported.base).read_text('utf-8')
    lines, left = text.splitlines(), dict(imported.settings)
    is_mixed = 'data_path' not in left
    unused = ('data_root', 'data_path', 'image_folder') if is_mixed else ('data_root',)  # the paths are written out
    for node in reversed(ast.parse(text).body):
        place = slice(node.lineno - 1, node.end_lineno)
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        name_set = target.id if isinstance(target, ast.Name) else ''
        if name_set in left:
            lines[place] = [f'{name_set} = {_written(left.pop(name_set))}']
        elif name_set in unused:
            del lines[place]
        elif is_mixed:
            lines[place] = _mixed('\n'.join(lines[place]), data=imported.data)
    if left:
        raise ConfigError(f'{imported.base} has no setting {sorted(left)[0]}')
    at = next(number for number, line in enumerate(lines) if line.startswith('from mmengine'))
    head = [f'# vlmtune train {one_line(name)}.py', f'# From the XTuner config {one_line(source)}.']
    return '\n'.join([*head, *lines[at:]]) + '\n'


def _mixed(statement: str, *, data: Sequence[Data]) -> list[str]:
    """A statement of a recipe for one data set as one for several."""
    if statement.startswith('train_dataset = '):
        member = textwrap.indent(statement.removeprefix('train_dataset = '), ' ' * 8)
        members = [_member(member, one) + ',' for one in data]
        repeats = [one.repeat_times for one in data]
        last = [] if all(often == 1 for often in repeats) else [f'    repeats={repeats},']
        return ['train_dataset = dict(', '    type=MixedDataset,', '    datasets=[', *members, '    ],', *last, ')']
    statement = statement.replace('from vlmtune.data import ', 'from vlmtune.data import MixedDataset, ')
    return [statement.replace('dict(train_dataset, ', "dict(train_dataset['datasets'][0], ")]


def _member(text: str, data: Data) -> str:
    told = {
        'path=data_path': f'path={_written(data.data_path)}',
        'image_folder=image_folder': f'image_folder={_written(data.image_folder)}',
    }
    return re.sub('|'.join(told), lambda found: told[found[0]], text)


def _written(value: Any) -> str:
    """Python for a plain value, with ``dict(...)`` as recipes have it."""
    if isinstance(value, Mapping):
        return f'dict({", ".join(f"{key}={_written(inner)}" for key, inner in value.items())})'
    return repr(value)
