"""``vlmtune import-config``: an XTuner 0.1 config of a LLaVA or an InternVL as a config of ours.

The file is parsed and never run: classes and functions are known by the names they are written with.
"""

import ast
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.config import config_mistakes, load_config
from vlmtune.recipes import resolve_config
from vlmtune.utils.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_SAME = (
    'data_path', 'image_folder', 'accumulative_counts', 'dataloader_num_workers', 'max_epochs', 'lr', 'betas',
    'weight_decay', 'max_norm', 'warmup_ratio', 'save_total_limit',
)  # fmt: skip
_FLOATS = ('weight_decay', 'max_norm')
_COUNTS = ('batch_size', 'accumulative_counts', 'max_length')
_TEMPLATES = {
    'vicuna': 'vicuna',
    'internlm2_chat': 'internlm2_chat',
    'llama3_chat': 'llama3_chat',
    'qwen_chat': 'chatml',
}
_IMAGE_TOKENS = {'clip-vit-large-patch14-336': 576, 'clip-vit-large-patch14': 256, 'siglip-so400m-patch14-384': 729}
_TILES = 12
_BASE = {'LLaVAModel': 'llava_internlm2_1_8b_qlora_mix665k', 'InternVL_V1_5': 'internvl2_2b_lora_foodie'}


class Name(str):
    """What an expression is that is no plain value: the text of it, such as ``PROMPT_TEMPLATE.vicuna``."""

    __slots__ = ()

    @property
    def last(self) -> str:
        """Behind the last dot."""
        return self.rpartition('.')[2]


@dataclass
class Imported:
    """Settings under our names, and what a reader should know about them."""

    base: str  # the recipe of ours that has the form
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_config(source: str, output: str) -> None:
    """Write the config ``output`` that trains what the XTuner config ``source`` trains.

    Raises:
        ConfigError: ``source`` is none of a LLaVA or an InternVL, or holds what has no place; ``output`` exists.
    """
    target = Path(output).expanduser()
    if target.suffix != '.py' or target.exists():
        raise ConfigError(f'{target}: expected the name of a new .py file')
    values = read_names(Path(source).expanduser())
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


# ---- reading, without running


def read_names(path: Path) -> dict[str, Any]:
    """The top-level values of a config; what is no plain value is its text, a ``Name``.

    Raises:
        ConfigError: it cannot be read, is no Python, or holds none of XTuner's settings.
    """
    try:
        tree = ast.parse(path.read_text('utf-8'))
    except OSError as error:
        raise ConfigError(f'{path} cannot be read: {error.strerror}; expected an XTuner config') from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f'{path} is no Python file: {error}') from error
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = _value(node.value, found)
    return found


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    def inner(child: ast.expr) -> Any:
        return _value(child, known)

    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.List() | ast.Tuple():
            return [inner(item) for item in node.elts]
        case ast.Dict():
            return {inner(key): inner(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        case ast.UnaryOp(op=ast.USub()) if isinstance(inner(node.operand), int | float):
            return -inner(node.operand)
        case ast.Call(func=ast.Name(id='dict'), args=[]):
            return {keyword.arg: inner(keyword.value) for keyword in node.keywords if keyword.arg}
        case ast.Call(func=ast.Name(id='int'), args=[only]) if isinstance(inner(only), int | float):
            return int(inner(only))
        case ast.BinOp(op=ast.Pow()) if isinstance(inner(node.left), int | float) and inner(node.right) == 2:
            return inner(node.left) ** 2
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = inner(node.left), inner(node.right)
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            texts = isinstance(node.op, ast.Add) and type(left) is str and type(right) is str
            if numbers or texts:
                try:
                    return _OPERATORS[type(node.op)](left, right)
                except ArithmeticError:
                    return Name(ast.unparse(node))
        case ast.JoinedStr():
            parts = [inner(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values]
            return ''.join(map(str, parts))
    return Name(ast.unparse(node))


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
        found.notes.append(
            f'max_patches is {_TILES}, as in config.json of the InternVL2 models; fewer tiles are faster'
        )
    _take_evaluation(values, found)
    _take_dtype(values, found)
    for name, value in list(found.settings.items()):
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
    dataset = (values.get('train_dataloader') or {}).get('dataset')
    if not isinstance(dataset, Mapping) or 'image_folder' not in dataset:
        raise ConfigError(
            f'{source}: train_dataloader.dataset: expected one LLaVADataset; several are a MixedDataset here '
            '(docs/data.md)'
        )
    if not str(dataset.get('dataset_map_fn')).endswith('llava_map_fn'):
        found.notes.append(
            f'dataset_map_fn is {dataset.get("dataset_map_fn")}: write that function anew (docs/extend.md)'
        )
    found.settings['pad_image_to_square'] = bool(dataset.get('pad_image_to_square'))
    template = values.get('prompt_template')
    known = _TEMPLATES.get(template.last) if isinstance(template, Name) else None
    if known is None:
        found.notes.append(f'prompt_template {template} has no counterpart: choose one of vlmtune/data/templates.py')
    found.settings['prompt_template'] = known
    tower = str(values.get('visual_encoder_name_or_path')).rpartition('/')[2]
    tokens = _IMAGE_TOKENS.get(tower, 576)
    found.settings['max_length'] = int(values.get('max_length', 2048)) + tokens
    found.notes.append(f'max_length counts the {tokens} tokens of an image here: it grew by as many')


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
    path = resolve_config(imported.base)
    text = path.read_text('utf-8')
    lines = text.splitlines()
    left = dict(imported.settings)
    for node in reversed(ast.parse(text).body):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign) and isinstance(target, ast.Name) and target.id in left:
            lines[node.lineno - 1 : node.end_lineno] = [f'{target.id} = {_written(left.pop(target.id))}']
        elif isinstance(target, ast.Name) and target.id == 'data_root':  # the paths are written out
            del lines[node.lineno - 1]
    if left:
        raise ConfigError(f'{imported.base} has no setting {sorted(left)[0]}')
    at = next(number for number, line in enumerate(lines) if line.startswith('from mmengine'))
    head = [f'# vlmtune train {one_line(name)}.py', f'# From the XTuner config {one_line(source)}.']
    return '\n'.join([*head, *lines[at:]]) + '\n'


def _written(value: Any) -> str:
    """Python for a plain value, with ``dict(...)`` as recipes have it."""
    if isinstance(value, Mapping):
        return f'dict({", ".join(f"{key}={_written(inner)}" for key, inner in value.items())})'
    return repr(value)
