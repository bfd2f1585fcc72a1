"""Loads a model of a known family."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from vlmtune.families import Family, find_family
from vlmtune.models.quantization import quantization_config
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.pretrained import load_pretrained

_AUTO_CLASSES = {'causal_lm': AutoModelForCausalLM, 'image_text_to_text': AutoModelForImageTextToText}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


def parse_dtype(name: str) -> torch.dtype:
    """'bfloat16' -> torch.bfloat16.

    Raises:
        ConfigError: a dtype that training does not support.
    """
    if name not in DTYPES:
        raise ConfigError(f'dtype={name!r} is not supported; expected one of {", ".join(DTYPES)}')
    return DTYPES[name]


def read_family(pretrained_model_name_or_path: str) -> Family:
    """The row of a checkpoint's family, from its config.json alone.

    Raises:
        ModelError: the checkpoint cannot be read or its family is not supported.
    """
    return find_family(load_pretrained(AutoConfig, pretrained_model_name_or_path).model_type)


def load_model(
    pretrained_model_name_or_path: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    attn_implementation: str = 'sdpa',
    device: str | torch.device = 'cpu',
) -> tuple[PreTrainedModel, Family]:
    """A transformers model and the row of its family.

    Quantised weights are made on ``device`` at once; other weights are loaded on the CPU and moved by the caller. On
    device 'meta' no weight is read or made; quantised layers are then plain ones.

    Raises:
        ModelError: the checkpoint cannot be read or its family is not supported.
        ConfigError: an unknown quantization.
    """
    family = read_family(pretrained_model_name_or_path)
    if torch.device(device).type == 'meta':
        config = load_pretrained(AutoConfig, pretrained_model_name_or_path)
        with torch.device('meta'):
            auto_class = _AUTO_CLASSES[family.auto_class]
            return auto_class.from_config(config, dtype=dtype, attn_implementation=attn_implementation), family
    quantized = quantization_config(quantization, family=family, dtype=dtype)
    options = {} if quantized is None else dict(quantization_config=quantized, device_map={'': torch.device(device)})
    model = load_pretrained(
        _AUTO_CLASSES[family.auto_class],
        pretrained_model_name_or_path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        **options,
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
