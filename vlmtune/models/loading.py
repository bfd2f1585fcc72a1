"""Loads a model of a known family."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from vlmtune.families import Family, find_family
from vlmtune.models.quantization import quantization_config
from vlmtune.models.sharded import convert_by_logical_shape
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.pretrained import load_pretrained

AUTO_CLASSES = {'causal_lm': AutoModelForCausalLM, 'image_text_to_text': AutoModelForImageTextToText}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """'bfloat16' -> torch.bfloat16.

    Raises:
        ConfigError: a dtype that training does not support.
    """
    if name not in DTYPES:
        raise ConfigError(f'dtype={name!r} is not supported; expected one of {", ".join(DTYPES)}')
    return DTYPES[name]


def read_family(pretrained_model_name_or_path: str, **source: Any) -> Family:
    """The row of a checkpoint's family, from its config.json alone.

    Args:
        pretrained_model_name_or_path: a folder or a hub id.
        source: trust_remote_code and revision, see ``load_pretrained``.

    Raises:
        ModelError: the checkpoint cannot be read or its family is not supported.
    """
    return find_family(load_pretrained(AutoConfig, pretrained_model_name_or_path, **source).model_type)


def load_model(
    pretrained_model_name_or_path: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    attn_implementation: str = 'sdpa',
    device: str | torch.device = 'cpu',
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Family]:
    """A transformers model and the row of its family.

    Quantised weights are made on ``device`` at once; other weights are loaded on the CPU and moved by the caller. On
    device 'meta' no weight is read or made; quantised layers are then plain ones. Random generators are left alone:
    whether and what loading draws depends on how the weights are loaded, and what is drawn next must not.

    Raises:
        ModelError: the checkpoint cannot be read or its family is not supported.
        ConfigError: an unknown quantization.
    """
    source: dict[str, Any] = dict(trust_remote_code=trust_remote_code, revision=revision)
    family = read_family(pretrained_model_name_or_path, **source)
    if torch.device(device).type == 'meta':
        config = load_pretrained(AutoConfig, pretrained_model_name_or_path, **source)
        with torch.device('meta'):
            auto_class = AUTO_CLASSES[family.auto_class]
            return auto_class.from_config(config, dtype=dtype, attn_implementation=attn_implementation), family
    if is_deepspeed_zero3_enabled():
        convert_by_logical_shape(family.model_type)
    quantized = quantization_config(quantization, family=family, dtype=dtype)
    options: dict[str, Any] = (
        {} if quantized is None else dict(quantization_config=quantized, device_map={'': torch.device(device)})
    )
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        model = load_pretrained(
            AUTO_CLASSES[family.auto_class],
            pretrained_model_name_or_path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **options,
            **source,
        )
    _keep_quantized_layout(model)
    return model, family


def _keep_quantized_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from rewriting 4-bit weights for inference on CPUs with AVX512-BF16.

    It does so in the first forward in evaluation mode, for good, into a layout that gives wrong gradients and cannot be
    dequantised; answers asked for on the way would spoil the training.
    """
    for module in model.modules():
        if getattr(module, 'support_avx512bf16_for_cpu', False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
