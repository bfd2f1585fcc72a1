"""What other programs call the weights that we train: PEFT's adapters, XTuner's and mmengine's checkpoints.

Names of ours are those inside the transformers model. What a family's original code calls its weights is known to
``vlmtune.layouts``; here stands what programs put around those names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedConfig

from vlmtune.families import Family
from vlmtune.layouts import NameMap, Weight
from vlmtune.layouts.names import Match
from vlmtune.layouts.weights import native_shapes
from vlmtune.utils.adapter_folder import PEFT_PREFIX
from vlmtune.utils.imports import import_name

_INSIDE = (('projector.', 'model.'), ('visual_encoder.', 'vision_model.'))  # XTuner writes it or leaves it out


def adapter_name(name: str) -> str:
    """The name of ours for a tensor of ``adapter_model.safetensors``."""
    name = name.removeprefix(PEFT_PREFIX)
    layer, mark, rest = name.partition('.lora_')
    if not mark or '.default' in rest:
        return name
    kind, _, tail = rest.partition('.')
    return f'{layer}.lora_{kind}.default.{tail or "weight"}'


def original_names(family: Family, config: PreTrainedConfig) -> list[NameMap]:
    """How the family's original layouts call the weights of a model with this config."""
    return [import_name(dotted).name_map(config) for _, dotted in family.layouts]


def placed(
    name: str, weight: Weight, *, places: Mapping[str, str], originals: list[NameMap]
) -> list[tuple[str, Weight]]:
    """The weights of ours that one in a file is, several where it is a fused one; none if it has no place.

    Args:
        name: in the file.
        weight: as it is there.
        places: every name by which a weight of the model is known -> its name.
        originals: of the family, see ``original_names``.
    """
    for spelling in _spellings(name):
        if spelling in places:
            return [(places[spelling], weight)]
        for names in originals:
            match = names.match(spelling)
            if match is not None and all(native in places for native in match.native):
                return [(places[n], part) for n, part in zip(match.native, _parts(weight, match), strict=False)]
    return []


def _spellings(name: str) -> Iterator[str]:
    """The name without what wrappers put before it: module of mmengine, model and llm of XTuner, and PEFT's."""
    plain = name.removeprefix('module.').replace(PEFT_PREFIX, '')
    yield from (plain, plain.removeprefix('model.'), plain.removeprefix('llm.'))
    for part, inside in _INSIDE:
        if plain.startswith(part):
            yield part + inside + plain.removeprefix(part)


def _parts(weight: Weight, match: Match) -> list[Weight]:
    """What a fused weight is here. Of an update B A to it, B is cut like the weight, and each part has the whole A."""
    count = len(match.native)
    shapes = [weight.shape] if '.lora_A.' in match.native[0] else native_shapes(match.rule.split, weight)
    if len(shapes) < count:  # it is not cut, or cannot be; the shape it has is told where it is compared
        return [weight] * count

    def read(index: int) -> Tensor:
        return match.rule.split(weight.read())[index]

    return [replace(weight, shape=shape, read=partial(read, i)) for i, shape in enumerate(shapes)]
