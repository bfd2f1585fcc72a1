"""Quantised weights: QLoRA's frozen ones, and those of checkpoints that were quantised for serving.

QLoRA's are bitsandbytes', 4 or 8 bit, the language model's linear layers only.
"""

import importlib.util

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from vlmtune.families import Family
from vlmtune.utils.errors import ConfigError

QUANTIZATIONS = ('nf4', 'int8')
# What transformers reads each kind of quantised checkpoint with.
_READERS = {
    'awq': ('gptqmodel',),
    'gptq': ('optimum', 'gptqmodel'),
    'compressed-tensors': ('compressed_tensors',),
    'bitsandbytes': ('bitsandbytes',),
}


def quantization_config(quantization: str | None, *, family: Family, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The configuration that keeps vision encoder, projector, embeddings and head out of quantisation.

    bitsandbytes matches a skipped module from the start of its full name or as a suffix, and a list of ours drops
    transformers' own skip of the head: so the full paths of the family, head included.

    Args:
        quantization: None, 'nf4' (double quantised, QLoRA: https://arxiv.org/abs/2305.14314) or 'int8'.
        family: says where the parts live.
        dtype: of the computation.

    Raises:
        ConfigError: an unknown word.
    """
    if quantization is None:
        return None
    skipped = [*family.vision_encoder, *family.projector, *family.embeddings, *family.lm_head]
    if quantization == 'nf4':
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type='nf4',
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    if quantization == 'int8':
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    raise ConfigError(f'quantization={quantization!r} is unknown; expected None, {", ".join(map(repr, QUANTIZATIONS))}')


def stored_quantization(config: PreTrainedConfig, *, asked: str | None = None) -> str | None:
    """How the weights of a checkpoint are quantised, by its config.json: 'awq', 'gptq', ..., or None.

    Args:
        config: of the checkpoint.
        asked: what they shall be quantised to.

    Raises:
        ConfigError: the package that reads them is missing, or they shall be quantised a second time.
    """
    stored = getattr(config, 'quantization_config', None)
    if not stored:
        return None
    raw = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(raw.get('quant_method'), 'value', raw.get('quant_method')))
    if asked is not None:
        raise ConfigError(
            f'{config.name_or_path} is quantised already ({method}); leave out quantization={asked!r} (--bits)'
        )
    for package in _READERS.get(method, ()):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'{config.name_or_path} holds {method} weights, which need the package {package}; '
                f'pip install {" ".join(_READERS[method])}'
            )
    return method
