"""Tiny originals have the names of the real ones: those with which the official code made the goldens."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vlmtune.layouts import open_weights
from vlmtune.models.loading import load_model

GOLDENS = Path(__file__).resolve().parents[1] / 'goldens'
PLAIN_LLAMA = dict(llm_config=dict(architectures=['LlamaForCausalLM'], model_type='llama', rope_scaling=None))


def without_numbers(names: Iterable[str]) -> set[str]:
    return {re.sub(r'\.[0-9]+\.', '.0.', name) for name in names}


@pytest.mark.parametrize(
    ('name', 'golden', 'settings'),
    [
        ('internlm2', 'internlm2', {}),
        ('internlm2', 'internlm2_biased', dict(bias=True, tie_word_embeddings=True)),
        ('points', 'points_reader', {}),
        ('internvl_chat', 'internvl2_2b', {}),
        (
            'internvl_chat',
            'internvl2_40b',
            dict(PLAIN_LLAMA, vision_config=dict(norm_type='rms_norm', qk_normalization=True, qkv_bias=False)),
        ),
        ('minicpmv2', 'minicpmv', {}),
    ],
)
def test_names(name, golden, settings, tiny_model):
    with safe_open(GOLDENS / f'{golden}.safetensors', 'pt') as file:
        real = {key.removeprefix('weights/') for key in file.keys() if key.startswith('weights/')}  # noqa: SIM118
    real -= {'vision_encoder.merger.ln_q.bias', 'vision_encoder.merger.mlp.2.bias', 'vision_encoder.merger.mlp.0.bias'}
    folder = tiny_model(name, **settings)
    assert without_numbers(open_weights(folder)) == without_numbers(real)
    model, _ = load_model(str(folder), dtype=torch.float32)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
