"""A frozen vision encoder, taken apart: what it says about images, and a model that is given that instead of pixels.

The features are what enters the projector. transformers' models take the projector's output in place of pixels
(``mm_encoder_outputs``), so nothing of the model is replaced and pixels work as before.

Letters: R rows (an image or a tile), N features of a row, D their size.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmtune.families import FAMILIES, Family
from vlmtune.models.tuning import PartPlan
from vlmtune.utils.errors import ConfigError


def check_cacheable(family: Family, *, plans: Mapping[Any, PartPlan]) -> None:
    """Tell whether the features of images are the same all through the training, and the model takes them.

    Raises:
        ConfigError: the vision encoder trains, or the family is not supported.
    """
    if family.ready_features is None:
        able = ', '.join(name for name, row in FAMILIES.items() if row.ready_features)
        raise ConfigError(f'vision_cache: not for {family.model_type}; supported are {able}; remove vision_cache')
    if plans['vision_encoder'].mode != 'frozen':
        raise ConfigError(
            f'vision_cache: the vision encoder trains (tune vision_encoder={plans["vision_encoder"].mode!r}), so its '
            "features change; set vision_encoder='frozen' or remove vision_cache"
        )


def encode_images(model: PreTrainedModel, inputs: Mapping[str, Tensor], *, family: Family) -> Tensor:
    """What enters the projector for these images, [R, N, D], in the dtype in which it was computed."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])

    handle = model.get_submodule(family.projector[0]).register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            cast(Any, model.base_model).get_image_features(**inputs, return_dict=True)
    finally:
        handle.remove()
    (features,) = caught
    return features


def ready_images(model: PreTrainedModel, features: Tensor, *, family: Family) -> dict[str, Any]:
    """``mm_encoder_outputs`` of the model, from features [R, N, D] as ``encode_images`` gives them."""
    projected = model.get_submodule(family.projector[0])(features)
    as_taken: Any = list(projected) if family.ready_features == 'list' else projected
    return {'image': BaseModelOutputWithPooling(pooler_output=as_taken)}
