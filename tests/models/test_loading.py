"""A model is what its checkpoint says, to the last weight: transformers itself makes new ones and goes on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.models import load_model
from vlmtune.utils.errors import ModelError

NORM = 'model.layers.1.input_layernorm.weight'


@pytest.fixture
def changed(tiny_model, tmp_path):
    """``changed(change)``: a tiny Llama whose tensors went through ``change``."""

    def make(change):
        folder = shutil.copytree(tiny_model('llama'), tmp_path / 'llama')
        tensors = load_file(folder / 'model.safetensors')
        change(tensors)
        save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
        return str(folder)

    return make


@pytest.mark.parametrize('quantization', [None, 'nf4'])
def test_a_weight_that_is_missing(changed, quantization):
    folder = changed(lambda tensors: tensors.pop(NORM))
    with pytest.raises(ModelError, match=f'does not fit its own config.json: 1 weights are missing .first: {NORM}'):
        load_model(folder, quantization=quantization)


def test_a_weight_of_another_shape(changed):
    folder = changed(lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}))
    with pytest.raises(ModelError, match=rf'{NORM} is \(63,\), expected \(64,\)'):
        load_model(folder)


def test_a_weight_too_many_is_none_of_the_models(changed):
    """Older files hold tables that are computed now; they harm no training, but a strict loader names them."""
    folder = changed(lambda tensors: tensors.update({'model.layers.1.table': torch.ones(2)}))
    load_model(folder)
    with pytest.raises(ModelError, match=r'1 weights are unknown \(first: model.layers.1.table\)'):
        load_model(folder, refuse_unknown=True)
