"""``verify-model``: what does not load, or not to the last weight, fails; what loads is described by numbers."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.apps.export.verify_model import as_text, verify, verify_model
from vlmtune.cli import main
from vlmtune.data.images import load_image
from vlmtune.models import load_model
from vlmtune.testing import list_tiny_originals
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError

CPU = torch.device('cpu')


@pytest.fixture
def copy(tiny_model, tmp_path):
    """``copy('llava')``: a tiny model that the test may break."""

    def make(name):
        return shutil.copytree(tiny_model(name), tmp_path / name)

    return make


def change_weights(folder, change):
    path = folder / 'model.safetensors'
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {'format': 'pt'})


def test_what_is_printed(tiny_model, capsys):
    path = tiny_model('llava', amplify=4.0)
    verify_model(str(path), device='cpu')
    out = capsys.readouterr().out
    assert f'{path}: llava, layout hf; 80 weights, ' in out
    assert 'none missing, unknown or of another shape' in out
    assert 'picture: 38 tokens, 9 of them of the image' in out
    assert 'warning: the loss on plain sentences is ' in out  # the weights are random
    verify_model(str(path), device='cpu', output='json')
    found = json.loads(capsys.readouterr().out)
    assert [case['name'] for case in found['cases']] == ['text', 'picture', 'inverted picture']
    assert set(found['cases'][1]['inputs']) == {'input_ids', 'attention_mask', 'pixel_values'}
    assert found['chance'] == pytest.approx(math.log(448))
    assert abs(found['loss'] - found['chance']) < 1


def test_the_same_is_asked_everywhere():
    """The pictures are made of numbers and stored without loss, so that checksums of pixels can be compared."""
    from vlmtune.apps.export.verify_model import picture

    image = load_image(picture())
    assert image.size == (448, 336)
    assert image.getpixel((370, 70)) == (250, 220, 60)
    assert image.getpixel((150, 200)) == (190, 40, 40)
    assert load_image(picture(inverted=True)).getpixel((150, 200)) == (65, 215, 215)


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'paligemma', *list_tiny_originals()])
def test_every_layout(name, tiny_model):
    found = verify(str(tiny_model(name, amplify=2.0)), dtype='float32', device=CPU)
    assert (found.layout == 'hf') == (name not in list_tiny_originals())
    assert found.weights > 20
    assert len(found.cases) in (1, 3)
    assert all(case.image_tokens > 0 for case in found.cases[1:])
    assert found.warnings == [w for w in found.warnings if 'plain sentences' in w]
    assert len(as_text(found).splitlines()) == 2 + 5 * len(found.cases) + len(found.warnings)


def test_the_figures_are_those_of_the_logits_and_repeat(tiny_model):
    first, second = (verify(str(tiny_model('llama')), dtype='float32', device=CPU) for _ in range(2))
    assert first == second
    other = verify(str(tiny_model('llama', seed=3)), dtype='float32', device=CPU)
    assert other.cases[0].inputs == first.cases[0].inputs
    assert other.cases[0].logits != first.cases[0].logits
    assert other.cases[0].checksum != first.cases[0].checksum
    (token, _, value), *_ = first.cases[0].top
    assert 0 <= token < 448
    assert value <= first.cases[0].logits['highest'] + 1e-4


def test_a_picture_that_is_not_felt(copy):
    """Weights that are there but zero: nothing is missing, and the answers do not depend on what is shown."""
    folder = copy('llava')
    change_weights(folder, lambda tensors: tensors['multi_modal_projector.linear_2.weight'].zero_())
    found = verify(str(folder), dtype='float32', device=CPU)
    assert any('do not feel what is on the picture' in warning for warning in found.warnings)


# ---- what fails


def test_a_weight_that_is_missing_unknown_or_of_another_shape(copy):
    def missing(tensors):
        del tensors['model.layers.1.mlp.up_proj.weight']

    def unknown(tensors):
        tensors['model.layers.1.mlp.gate.weight'] = torch.ones(2)

    def cut(tensors):
        tensors['lm_head.weight'] = tensors['lm_head.weight'][:-1].clone()

    for change, words in (
        (missing, r'1 weights are missing \(first: model.layers.1.mlp.up_proj.weight\)'),
        (unknown, r'1 weights are unknown \(first: model.layers.1.mlp.gate.weight\)'),
        (cut, r'1 weights are of another shape \(first: lm_head.weight is \(447, 64\), expected \(448, 64\)\)'),
    ):
        folder = copy('llama')
        change_weights(folder, change)
        with pytest.raises(ModelError, match=words) as caught:
            verify(str(folder), dtype='float32', device=CPU)
        assert '\n' not in str(caught.value)
        shutil.rmtree(folder)


def test_an_original_that_lacks_a_weight(copy, capsys):
    folder = copy('internlm2')
    change_weights(folder, lambda tensors: tensors.pop('model.layers.0.attention.wqkv.weight'))
    assert main(['verify-model', str(folder)]) == 1
    err = capsys.readouterr().err
    assert f'error: the weights in {folder} are no InternLM2 as config.json describes it: 3 are' in err.splitlines()[-1]


@pytest.mark.parametrize('name', ['llama', 'internlm2'])
def test_a_shard_that_is_missing(name, copy):
    folder = copy(name)
    names = list(load_file(folder / 'model.safetensors'))
    places = dict.fromkeys(names, 'model-00001-of-00002.safetensors') | {names[0]: 'model-00002-of-00002.safetensors'}
    (folder / 'model.safetensors').rename(folder / 'model-00001-of-00002.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    with pytest.raises(ModelError, match='lacks model-00002-of-00002.safetensors, one of 2 files'):
        verify(str(folder), dtype='float32', device=CPU)


def test_logits_that_are_not_finite(copy):
    folder = copy('llama')
    change_weights(folder, lambda tensors: tensors['model.norm.weight'].fill_(math.nan))
    with pytest.raises(ModelError, match=r'text: \d+ of \d+ logits are not finite'):
        verify(str(folder), dtype='float32', device=CPU)


def test_more_image_tokens_than_features(copy):
    folder = copy('llava')
    joint = folder / 'processor_config.json'
    joint.write_text(json.dumps(json.loads(joint.read_text()) | dict(num_additional_image_tokens=3)))
    with pytest.raises(ModelError, match='the model does not take its inputs: .*[Ii]mage'):
        verify(str(folder), dtype='float32', device=CPU)


def test_a_family_that_is_not_known(copy):
    folder = copy('llama')
    config = json.loads((folder / 'config.json').read_text()) | dict(model_type='bloom')
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelError, match="model type 'bloom' is not supported"):
        verify(str(folder), dtype='float32', device=CPU)


def test_a_pickle_is_not_run(copy, tmp_path):
    class Run:
        def __reduce__(self):
            return (open, (str(tmp_path / 'run'), 'w'))

    folder = copy('internlm2')
    (folder / 'model.safetensors').unlink()
    torch.save({'model.norm.weight': Run()}, folder / 'pytorch_model.bin')
    with pytest.raises(CheckpointError, match=r'pytorch_model.bin is not read: .*open'):
        verify(str(folder), dtype='float32', device=CPU)
    assert not (tmp_path / 'run').exists()


def test_settings_that_are_none(tiny_model):
    with pytest.raises(ConfigError, match='--device tpu: expected cpu, cuda or auto'):
        verify_model(str(tiny_model('llama')), device='tpu')
    with pytest.raises(ConfigError, match='--dtype int8: expected auto or one of float32'):
        verify_model(str(tiny_model('llama')), dtype='int8')


def test_the_dtype_of_the_checkpoint(tiny_model):
    found = verify(str(tiny_model('llama', dtype='bfloat16')), dtype='auto', device=CPU)
    assert found.dtype == 'bfloat16'
    assert load_model(found.path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
