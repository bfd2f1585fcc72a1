"""Complete Hugging Face directories of tiny random models, written in well under a second."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmtune.testing.tiny_configs import TINY_FAMILIES, build_config
from vlmtune.testing.tiny_originals import TINY_ORIGINALS, write_tiny_original
from vlmtune.testing.tiny_processors import write_processor_files
from vlmtune.testing.tiny_tokenizers import build_tokenizer

_NOISE = 0.1  # standard deviation


def list_tiny_models() -> list[str]:
    """Models in the layout of transformers: model types, and ``internvl_llama``, an InternVL on a Llama."""
    return list(TINY_FAMILIES)


def list_tiny_originals() -> list[str]:
    """Models in a layout of their own, which ``vlmtune.layouts`` knows."""
    return list(TINY_ORIGINALS)


def write_tiny_model(
    model_type: str,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: str = 'float32',
    amplify: float = 1.0,
    **config_overrides: Any,
) -> Path:
    """Write config, weights, tokenizer, chat template and processor files of a tiny random model; returns the path.

    ``AutoConfig``, ``AutoTokenizer``, ``AutoImageProcessor`` and ``AutoModelForImageTextToText`` (text models:
    ``AutoModelForCausalLM``) load the directory, without torchvision. The weights file is smaller than 2 MB.

    Args:
        model_type: one of ``list_tiny_models()`` or ``list_tiny_originals()``. The Auto classes do not load the latter.
        directory: made if it does not exist.
        seed: of the weights; the global random state is left alone.
        dtype: of the stored weights, a name such as ``'bfloat16'``.
        amplify: every weight of two or more dimensions is multiplied by it. Fresh weights are so small that a sample
            hardly feels its neighbours; with 4.0 a leak between packed samples is plain to see.
        **config_overrides: keys of the config; a dict is merged into the sub-config of that name, as in
            ``text_config={'num_hidden_layers': 4}``.

    Raises:
        ValueError: no tiny model has that name.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    if model_type in TINY_ORIGINALS:
        write_tiny_original(
            model_type,
            path,
            random_model=partial(_random_model, seed=seed, amplify=amplify),
            dtype=dtype,
            overrides=config_overrides,
        )
        return path
    if model_type not in TINY_FAMILIES:
        raise ValueError(f'no tiny model {model_type!r}; known are {", ".join([*TINY_FAMILIES, *TINY_ORIGINALS])}')
    family = TINY_FAMILIES[model_type]
    tokenizer = build_tokenizer(family.tokenizer)
    config = build_config(family, tokenizer=tokenizer, overrides=config_overrides)
    auto_class = AutoModelForCausalLM if family.vision is None else AutoModelForImageTextToText
    model = _random_model(auto_class, config, seed=seed, amplify=amplify)
    model.generation_config = _generation_config(tokenizer)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_processor_files(family.model_type, path)
    return path


def _random_model(auto_class: Any, config: PreTrainedConfig, *, seed: int, amplify: float) -> PreTrainedModel:
    """Constant parameters get noise: a norm of ones hides that it ran twice, a projector of zeros hides the image."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class.from_config(config)
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(_NOISE * torch.randn_like(parameter))
            if parameter.ndim > 1:
                parameter.mul_(amplify)
    return model


def _generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
