"""PEFT adapters, ours and others': where one lies, and how it is put on a model.

PEFT is imported where it is used: it brings bitsandbytes along, which a chat without an adapter need not load.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from vlmtune.data.image_refs import shorten
from vlmtune.engine.manifest import MANIFEST
from vlmtune.utils.adapter_folder import ADAPTER_WEIGHTS, adapter_settings, adapter_weights, base_of
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.hub import looks_like_id
from vlmtune.utils.pretrained import NO_WEIGHTS, find_folder

if TYPE_CHECKING:
    from peft import PeftModel

_REASON = 320  # characters; PEFT may list every module


def find_adapter(adapter: str) -> Path:
    """The folder of a LoRA adapter: a local one, or a hub id, which is downloaded.

    Raises:
        CheckpointError: there is none, it is no LoRA adapter, or its weights are in a format that can run code.
    """
    folder = Path(adapter).expanduser()
    if looks_like_id(adapter):
        folder = find_folder(adapter, patterns=(*NO_WEIGHTS, ADAPTER_WEIGHTS), what='adapter', error=CheckpointError)
    refuse_checkpoint(folder)
    adapter_settings(folder)
    adapter_weights(folder)
    return folder


def refuse_checkpoint(folder: Path) -> None:
    """Raise where an export is expected and a checkpoint of a run was named.

    Raises:
        CheckpointError: it is one.
    """
    if (folder / MANIFEST).is_file():
        raise CheckpointError(
            f'{folder} is a checkpoint; write it first: vlmtune convert pth_to_hf CONFIG {folder} OUT'
        )


def attach_adapter(model: PreTrainedModel, folder: Path) -> 'PeftModel':
    """Put an adapter on a model, so that it computes as in training under autocast to the model's dtype.

    Embeddings grow to the adapter's. What was trained in full is kept in float32, and so are layer norms: those cannot
    take the float32 output of a trained layer in a lower precision (on the CPU). On an outline, a model on the meta
    device, the tensors of the adapter stay in its file until they are looked at.

    Raises:
        CheckpointError: it does not fit the model, or any of its tensors has no place there.
    """
    from peft import LoraConfig, PeftModel  # noqa: PLC0415
    from peft.utils import ModulesToSaveWrapper  # noqa: PLC0415

    is_outline = model.device.type == 'meta'
    place = 'cpu' if is_outline else str(model.device)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        _grow_embeddings(model, folder / ADAPTER_WEIGHTS)
        if is_outline and config.trainable_token_indices is not None:  # of which PEFT copies rows at once
            _place(model.get_input_embeddings(), 'cpu')
            model.tie_weights()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # PEFT asks transformers by names that are being replaced
            adapted = PeftModel(model, config, low_cpu_mem_usage=is_outline)
        if is_outline:
            _place_bases(adapted, 'cpu')
        for module in adapted.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save.float()
            elif isinstance(module, nn.LayerNorm):
                module.float()
        result = adapted.load_adapter(str(folder), 'default', torch_device=place, low_cpu_mem_usage=is_outline)
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = shorten(' '.join(' '.join(lines[:2]).split()), _REASON)  # torch adds a line for each other tensor
        raise CheckpointError(
            f'the adapter {folder}, which names {base_of(folder)} as its base, does not fit this '
            f'{model.config.model_type}: {reason}'
        ) from error
    if is_outline:
        _place_bases(adapted, 'meta')
    if lost := [*result.unexpected_keys, *result.missing_keys]:
        raise CheckpointError(
            f'the adapter {folder}, which names {base_of(folder)} as its base, does not fit this one: '
            f'{len(result.unexpected_keys)} of its tensors have no place in {type(model).__name__}, '
            f'{len(result.missing_keys)} are missing (first: {lost[0]})'
        )
    return adapted.eval()


def _place_bases(adapted: 'PeftModel', device: str) -> None:
    """Put what stands for the weights under an adapter on a device.

    PEFT moves what it loads to the device of the weight under it, where on 'meta' the values would be lost.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415

    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            for inner in list(module.get_base_layer().modules()):
                _place(inner, device)


def _place(module: nn.Module, device: str) -> None:
    """Replace the weights of a module by zeros that take no memory."""
    for name, weight in list(module.named_parameters(recurse=False)):
        nothing = torch.zeros((), device=device).expand(weight.shape)  # float32: PEFT takes the dtype, too
        setattr(module, name, nn.Parameter(nothing, requires_grad=False))


def _grow_embeddings(model: PreTrainedModel, weights: Path) -> None:
    have: int = model.get_input_embeddings().get_parameter('weight').shape[0]
    with safe_open(weights, 'pt') as file:
        names = [name for name in file.keys() if name.endswith(('embed_tokens.weight', 'lm_head.weight'))]  # noqa: SIM118
        rows = max((file.get_slice(name).get_shape()[0] for name in names), default=have)
    if rows > have:
        model.resize_token_embeddings(rows, mean_resizing=False)
