"""``load_from``: whatever it takes ends as the weights that the run starts from. Runs have a learning rate of 0."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.train import train
from vlmtune.models import SupervisedFinetune
from vlmtune.utils.errors import CheckpointError, ModelError

LORA = dict(projector='full', llm='lora')
FULL = dict(vision_encoder='full', projector='full', llm='full')
STILL = dict(lr=0.0, max_epochs=None, max_steps=1, horizon=1, save_steps=1)


def assert_equal(found, expected):
    assert set(found) >= set(expected)
    assert expected
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- ours


@pytest.fixture(scope='module')
def checkpoint(write_recipe, tmp_path_factory):
    """One of ours whose weights moved."""
    folder = tmp_path_factory.mktemp('ours')
    recipe = write_recipe(folder / 'recipe.py')
    train(str(recipe), work_dir=str(folder), overrides=dict(STILL, lr=0.1, lora_dropout=0.0))
    return folder / 'iter_1.pth'


def test_a_checkpoint_of_ours(checkpoint, start_from):
    expected = load_file(checkpoint / 'model.safetensors')
    assert_equal(start_from('a', checkpoint), expected)


def test_parts_of_which_it_holds_nothing_keep_their_weights(checkpoint, start_from, run, caplog):
    """The usual second stage: a projector that was trained alone, and a language model that starts to learn."""
    first = run('first', recipe=dict(tune=dict(projector='full')), **{**STILL, 'lr': 0.1})
    caplog.set_level('INFO')
    found = start_from('a', first / 'iter_1.pth')
    assert_equal(found, load_file(first / 'iter_1.pth' / 'model.safetensors'))
    assert any('lora_A' in name for name in found)
    assert 'left as they were: llm' in caplog.text


def test_what_trained_there_and_is_frozen_here(checkpoint, start_from):
    with pytest.raises(CheckpointError, match='no place in this run .*lora_A'):
        start_from('a', checkpoint, tune=dict(projector='full'))


# ---- adapters


@pytest.fixture(scope='module')
def adapter(checkpoint):
    """What ``pth_to_hf`` makes of the checkpoint."""
    folder = checkpoint.parent / 'adapter'
    pth_to_hf(str(checkpoint.parent / 'recipe.py'), str(checkpoint), str(folder))
    assert (folder / 'adapter_model.safetensors').is_file()
    return folder


def test_an_adapter(adapter, checkpoint, start_from):
    assert_equal(start_from('a', adapter), load_file(checkpoint / 'model.safetensors'))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(lora_r=8), 'has rank 4 and alpha 8 at .*_proj, this run rank 8 and alpha 8'),
        ({'model.lora.alpha': 16}, 'has rank 4 and alpha 8 at .*, this run rank 4 and alpha 16'),
        ({'model.lora.use_rslora': True}, 'has use_rslora=False, this run True'),
    ],
)
def test_an_adapter_of_other_lora_settings(adapter, start_from, settings, message):
    with pytest.raises(CheckpointError, match=message):
        start_from('a', adapter, **settings)


def test_a_pattern_of_a_stranger_is_never_run(adapter, start_from, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / 'adapter')
    config = json.loads((copy / 'adapter_config.json').read_text())
    config['alpha_pattern'] = {'(.*.*.*.*.*.*.*.*.*.*.*.*)*!': 8}
    (copy / 'adapter_config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='which cannot be compared'):
        start_from('a', copy)


def test_a_layer_that_the_adapter_lacks(adapter, start_from, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / 'adapter')
    tensors = load_file(copy / 'adapter_model.safetensors')
    save_file({k: v for k, v in tensors.items() if 'q_proj' not in k}, copy / 'adapter_model.safetensors')
    with pytest.raises(CheckpointError, match='lacks 4 of the tensors that train here .*q_proj'):
        start_from('a', copy)


# ---- Hugging Face models


def test_a_hugging_face_model(start_from, tiny_model):
    base = tiny_model('llava', seed=5)
    whole = SupervisedFinetune(str(base), tune=FULL, dtype='float32')
    found = start_from('a', base, tune=FULL)
    assert_equal(found, whole.named_trainable())


def test_a_model_whose_frozen_weights_are_others(start_from, tiny_model):
    with pytest.raises(CheckpointError, match='that are frozen here .* set pretrained_model_name_or_path'):
        start_from('a', tiny_model('llava', seed=5), tune=dict(projector='full'))


def test_a_model_of_another_family(start_from, tiny_model):
    with pytest.raises(CheckpointError, match='is a model of type qwen2, this run trains a llava'):
        start_from('a', tiny_model('qwen2'), tune=FULL)


def test_a_model_without_some_of_its_tensors(start_from, tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model('llava', seed=5), tmp_path / 'model')
    tensors = load_file(copy / 'model.safetensors')
    tensors.pop('multi_modal_projector.linear_1.bias')
    save_file(tensors, copy / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ModelError, match='does not fit its own config.json: 1 weights are missing .*linear_1.bias'):
        start_from('a', copy, tune=FULL)


# ---- found early


@pytest.mark.parametrize('name', ['nothing', 'folder', 'weights.safetensors'])
def test_what_cannot_be_loaded_is_told_before_anything_is_built(name, tmp_path, write_recipe):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'weights.safetensors').write_bytes(b'x')
    recipe = write_recipe(tmp_path / 'recipe.py', model='/nowhere')
    with pytest.raises(CheckpointError, match='expected iter_N.pth of vlmtune'):
        train(str(recipe), work_dir=str(tmp_path / 'a'), overrides=dict(load_from=str(tmp_path / name)))
