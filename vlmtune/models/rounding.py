"""The rounding of a quantised base, once more: what an adapter that was trained on it corrects."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from vlmtune.layouts import Weight


def quantized_again(
    weights: Mapping[str, Weight],
    outline: PreTrainedModel,
    *,
    config: BitsAndBytesConfig | None,
    device: torch.device,
) -> dict[str, Weight]:
    """Weights as a quantised model computes with them: those of its linear layers are rounded when they are read.

    Args:
        weights: of the model, in the dtype of its computation.
        outline: its modules on the meta device; their linear layers are replaced.
        config: of the quantisation; None where there is none.
        device: where it is computed.
    """
    quantized = dict(weights)
    if config is None:
        return quantized
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=outline, device_map=None)
    for path, _ in outline.named_modules():
        name = f'{path}.weight'
        if name in weights and quantizer.param_needs_quantization(outline, name):
            quantized[name] = replace(
                weights[name],
                dtype=weights[name].dtype if config.load_in_4bit else torch.float32,
                read=partial(_rounded, quantizer, outline, name, weights[name], device),
            )
    return quantized


def _rounded(quantizer: Any, outline: PreTrainedModel, name: str, weight: Weight, device: torch.device) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # noqa: PLC0415  # brings bitsandbytes along

    ((_, made),) = quantizer.get_quantize_ops().convert({name: weight.read().to(device)}, model=outline).items()
    return dequantize_bnb_weight(made, SimpleNamespace(SCB=None))
