"""A model of which no weight is in memory: each is read when it is needed, and models of any size can be rewritten."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from vlmtune.layouts import Weight, find_layout, open_native, open_weights, read_config
from vlmtune.models.loading import build_outline, by_names_in_files, refuse_misfit, tied_names
from vlmtune.utils.errors import CheckpointError, ModelError
from vlmtune.utils.pretrained import find_folder

logger = logging.getLogger(__name__)

_PATTERNS = ('*.json', '*.safetensors')
_OLDER_PATTERNS = ('*.json', 'pytorch_model*.bin')


@dataclass(frozen=True)
class LazyModel:
    """What is known of a model before a weight is read.

    Attributes:
        outline: its modules, whose weights are never looked at; ``config`` goes with it.
        weights: by their names in ``outline.state_dict()``; a tied weight is there under both names, as one object.
        dtype: in which floating-point weights are read.
        joined: names that come from the same tensors of the files, where those are more or fewer, such as experts.
    """

    outline: PreTrainedModel
    weights: Mapping[str, Weight]
    dtype: torch.dtype
    joined: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> 'LazyModel':
        """A model that is in memory."""
        seen: dict[int, Weight] = {}
        state = model.state_dict(keep_vars=True)
        weights = {name: seen.setdefault(id(tensor), weight_of(tensor)) for name, tensor in state.items()}
        return cls(model, weights, model.dtype)


def weight_of(tensor: Tensor) -> Weight:
    """A tensor that is in memory, or of which a page is when it is looked at."""
    return Weight(tuple(tensor.shape), tensor.dtype, Path(), tensor.detach)


def cast(weight: Weight, dtype: torch.dtype) -> Weight:
    """A floating-point weight in another dtype; any other as it is."""
    if weight.dtype == dtype or not weight.dtype.is_floating_point:
        return weight
    return replace(weight, dtype=dtype, read=lambda: weight.read().to(dtype))


def cast_all(weights: Mapping[str, Weight], dtype: torch.dtype) -> dict[str, Weight]:
    """Floating-point weights in another dtype; one that has two names stays one."""
    made = {id(weight): cast(weight, dtype) for weight in weights.values()}
    return {name: made[id(weight)] for name, weight in weights.items()}


def open_lazily(name_or_path: str, *, dtype: torch.dtype) -> LazyModel:
    """The weights of a checkpoint in any known layout, under the names of the modules.

    Args:
        name_or_path: a folder or a hub id.
        dtype: in which they are read.

    Raises:
        ModelError: the checkpoint cannot be read, its family is not supported, or a weight is missing or of another
            shape; the first is named.
    """
    outline = build_outline(read_config(name_or_path), dtype=dtype)
    if getattr(outline.config, 'quantization_config', None):
        raise ModelError(f'{name_or_path} holds quantised weights; take the model that it was made from')
    found = _files_of(name_or_path, outline)
    weights, joined = _by_module_names(found, outline)
    expected = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    _tie(weights, outline)
    wrong = [(name, weights[name].shape, shape) for name, shape in expected.items() if name in weights]
    report = dict(
        missing_keys=[name for name in expected if name not in weights],
        mismatched_keys=[entry for entry in wrong if entry[1] != entry[2]],
    )
    refuse_misfit(name_or_path, report, kinds=report)
    return LazyModel(outline, cast_all({name: weights[name] for name in expected}, dtype), dtype, joined)


def _files_of(name_or_path: str, outline: PreTrainedModel) -> Mapping[str, Weight]:
    """The weights under the names that they have, or would have, in files of transformers."""
    layout = find_layout(name_or_path)
    if layout is not None:
        expected = {name: tensor.shape for name, tensor in outline.state_dict().items()}
        found = (layout.open_weights or open_weights)(find_folder(name_or_path))
        native = open_native(found, layout=layout, config=outline.config, expected=expected, tied=tied_names(outline))
        return by_names_in_files(native, outline)
    folder = find_folder(name_or_path, patterns=_PATTERNS)
    if not any(folder.glob('*.safetensors')):
        folder = find_folder(name_or_path, patterns=_OLDER_PATTERNS)
    return open_weights(folder)


# ---- names in the files and names of the modules, as transformers maps them


def _by_module_names(
    found: Mapping[str, Weight], outline: PreTrainedModel
) -> tuple[dict[str, Weight], tuple[tuple[str, ...], ...]]:
    """Weights that the model has, and which of them come from the same tensors. What is unknown is left out."""
    mapping = get_model_conversion_mapping(outline)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    expected, prefix = outline.state_dict(), outline.base_model_prefix
    weights: dict[str, Weight] = {}
    parts: dict[str, list[tuple[str, str, Weight]]] = defaultdict(list)
    for name in sorted(found, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target in expected and pattern is None:
            weights[target] = found[name]
        elif target in expected:
            parts[target].append((pattern or '', name, found[name]))
    used = [step for step in mapping if step.was_used()]
    outline._weight_conversions = used  # type: ignore[assignment]  # as from_pretrained leaves it
    joined = []
    for target, sources in parts.items():
        (converter,) = [step for step in converters if sources[0][0] in step.source_patterns]
        convert = partial(_converted, converter, target, sources, outline)
        shapes = convert(lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device='meta'))
        for name, shape in shapes.items():
            read = partial(_one_of, convert, name)
            weights[name] = Weight(tuple(shape.shape), shape.dtype, sources[0][2].file, read)
        joined.append(tuple(shapes))
    return weights, tuple(joined)


def _converted(
    converter: WeightConverter,
    target: str,
    sources: list[tuple[str, str, Weight]],
    outline: PreTrainedModel,
    read: Callable[[Weight], Tensor],
) -> dict[str, Tensor]:
    step = deepcopy(converter)
    for pattern, name, weight in sources:
        step.add_tensor(target, name, pattern, read(weight))  # type: ignore[arg-type]
    made = step.convert(target, model=outline, config=outline.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _one_of(convert: Callable[[Callable[[Weight], Tensor]], dict[str, Tensor]], name: str) -> Tensor:
    return convert(_read)[name]


def _read(weight: Weight) -> Tensor:
    return weight.read()


def _tie(weights: dict[str, Weight], outline: PreTrainedModel) -> None:
    """Give a tied weight that lies in the files once its other name, too."""
    for names in outline.all_tied_weights_keys.items():
        have = [name for name in names if name in weights]
        if len(have) == 1:
            weights.update(dict.fromkeys(names, weights[have[0]]))


def with_trained(model: LazyModel, tensors: Mapping[str, Tensor]) -> LazyModel:
    """A model with other values, in its own dtype. Those of a weight with two names go under both."""
    second = {id(model.weights[name]): cast(weight_of(tensor), model.dtype) for name, tensor in tensors.items()}
    return replace(model, weights={name: second.get(id(old), old) for name, old in model.weights.items()})


def grow_embeddings(model: LazyModel, rows: int) -> LazyModel:
    """A model with room for added tokens. The new rows have no values; whoever grows it has to bring whole weights."""
    outline, weights = model.outline, dict(model.weights)
    have = outline.get_input_embeddings().get_parameter('weight').shape[0]
    if rows <= have:
        return model
    outline.resize_token_embeddings(rows, mean_resizing=False)
    grown: dict[int, Weight] = {}
    for name, tensor in outline.state_dict().items():
        old = weights[name]
        if tuple(tensor.shape) != old.shape:
            new = replace(old, shape=tuple(tensor.shape), read=partial(_no_rows, name, rows))
            weights[name] = grown.setdefault(id(old), new)
    return replace(model, weights=weights)


def _no_rows(name: str, rows: int) -> Tensor:
    raise CheckpointError(f'the embeddings have {rows} rows, but nothing trained brings {name} with as many')


def settle_ties(model: LazyModel) -> LazyModel:
    """Make tied weights one where they are equal; where they are not, the config says that they are two."""
    weights = dict(model.weights)
    for second, first in model.outline.all_tied_weights_keys.items():
        if weights[first] is weights[second]:
            continue
        if weights[first].shape == weights[second].shape and torch.equal(weights[first].read(), weights[second].read()):
            weights[second] = weights[first]
        else:
            logger.info('%s and %s are no longer equal: they are written as two tensors', first, second)
            model.outline.config.tie_word_embeddings = False
    return replace(model, weights=weights)


# ---- what is written


def in_files(model: LazyModel, names: tuple[str, ...], *, read: bool = False) -> dict[str, Tensor]:
    """Weights under the names, and in the pieces, that files of transformers have.

    Args:
        model: the model.
        names: one of ``units(model)``.
        read: whether to read them; else they are tensors of the same shapes and dtypes on the meta device.
    """
    tensors = {}
    for name in names:
        weight = model.weights[name]
        tensors[name] = weight.read() if read else torch.empty(weight.shape, dtype=weight.dtype, device='meta')
    return revert_weight_conversion(model.outline, tensors)


def units(model: LazyModel) -> Iterator[tuple[str, ...]]:
    """Names of weights that are read and written together; of a tied weight, the first one."""
    homes = {name: names for names in model.joined for name in names}
    seen: set[int] = set()
    for name, weight in model.weights.items():
        names = homes.get(name, (name,))
        if name == names[0] and id(weight) not in seen:
            yield names
        seen.add(id(weight))
