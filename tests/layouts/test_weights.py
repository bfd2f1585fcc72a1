"""How weights of a checkpoint are found, and how they become those of the native model and those of the original."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vlmtune.layouts import Layout, Rule, Weight, open_weights, rename, to_native, to_original
from vlmtune.utils.errors import CheckpointError, ModelError

LAYOUT = Layout(
    'made-up layout',
    read_config=lambda raw: None,
    write_processor_files=lambda source, target: None,
    rules=lambda config: (
        rename('emb.weight', 'embed.weight'),
        rename('out.weight', 'head.weight'),
        Rule('{i}.kv', ('{i}.k', '{i}.v'), lambda t: t.split([1, t.shape[0] - 1]), torch.cat),
    ),
    kept=('{i}.inv_freq',),
)
TENSORS = {
    'emb.weight': torch.arange(6.0).view(3, 2).bfloat16(),
    '0.kv': torch.arange(8.0).view(4, 2),
    '0.inv_freq': torch.ones(2),
}
EXPECTED = {'embed.weight': torch.Size([3, 2]), 'head.weight': torch.Size([3, 2]),
            '0.k': torch.Size([1, 2]), '0.v': torch.Size([3, 2])}  # fmt: skip
TIED = frozenset({'head.weight'})
CONFIG = SimpleNamespace()


def folder_of(path, **files):
    """A model folder of safetensors files, with an index where there are several."""
    for name, tensors in files.items():
        save_file(tensors, path / f'{name}.safetensors')
    if len(files) > 1:
        places = {key: f'{name}.safetensors' for name, tensors in files.items() for key in tensors}
        (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
    return path


def native(weights, **changes):
    return to_native(weights, **{**dict(layout=LAYOUT, config=CONFIG, expected=EXPECTED, tied=TIED), **changes})


@pytest.fixture
def weights(tmp_path):
    first, *rest = TENSORS
    return open_weights(folder_of(tmp_path, a={first: TENSORS[first]}, b={name: TENSORS[name] for name in rest}))


def test_weights_of_all_files_are_found(weights, tmp_path):
    assert {name: (w.shape, w.dtype) for name, w in weights.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()
    }
    assert all(torch.equal(w.read(), TENSORS[name]) for name, w in weights.items())
    assert weights['emb.weight'].file == tmp_path / 'a.safetensors'


def test_weights_of_bin_files_are_found(tmp_path):
    torch.save(TENSORS, tmp_path / 'pytorch_model.bin')
    assert all(torch.equal(w.read(), TENSORS[name]) for name, w in open_weights(tmp_path).items())


def test_a_bin_file_that_could_run_code_is_refused(tmp_path):
    torch.save({'emb.weight': re.compile('x')}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(CheckpointError, match='pytorch_model.bin'):
        open_weights(tmp_path)


def test_a_missing_shard_is_named(weights, tmp_path):
    (tmp_path / 'b.safetensors').unlink()
    with pytest.raises(ModelError, match=r'lacks b\.safetensors, one of 2 files that model\.safetensors\.index\.json'):
        open_weights(tmp_path)


def test_a_weight_that_the_index_promises_and_no_file_holds(weights, tmp_path):
    save_file({'0.inv_freq': torch.ones(2)}, tmp_path / 'b.safetensors')
    with pytest.raises(ModelError, match=r'b\.safetensors lacks 0\.kv'):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    'content', ['[]', '{}', '{"weight_map": [1]}', '{', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_an_index_that_is_none(content, tmp_path):
    (tmp_path / 'model.safetensors.index.json').write_text(content)
    with pytest.raises(ModelError, match=r'model\.safetensors\.index\.json'):
        open_weights(tmp_path)


def test_a_cut_file_and_no_file(weights, tmp_path):
    with pytest.raises(ModelError, match='holds no weights; expected'):
        open_weights(tmp_path / 'elsewhere')
    data = (tmp_path / 'a.safetensors').read_bytes()
    (tmp_path / 'a.safetensors').write_bytes(data[:-1])
    with pytest.raises(ModelError, match=r'a\.safetensors cannot be read'):
        open_weights(tmp_path)


def test_the_original_becomes_the_native_model_and_goes_back_bit_by_bit(weights):
    found = native(weights)
    assert set(found) == set(EXPECTED) - TIED
    assert torch.equal(torch.cat([found['0.k'], found['0.v']]), TENSORS['0.kv'])

    trained = {name: tensor.float() for name, tensor in found.items()}
    back = dict(to_original(trained, source=weights, layout=LAYOUT, config=CONFIG))
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in TENSORS.items())


def test_weights_that_are_missing_or_unknown_are_named(weights, tmp_path):
    renamed = {('1.kv' if name == '0.kv' else name): weight for name, weight in weights.items()}
    message = (
        rf'the weights in {tmp_path} are no made-up layout as config\.json describes it: '
        r'1 weights are unknown \(first: 1\.kv\) and 2 are missing \(first, by the name here: 0\.k\)'
    )
    with pytest.raises(ModelError, match=message):
        native(renamed)
    with pytest.raises(ModelError, match=r'1 are missing \(first, by the name here: head\.weight\)'):
        native(weights, tied=frozenset())


def test_a_weight_of_another_shape_is_named(weights):
    with pytest.raises(
        ModelError, match=r'b\.safetensors: 0\.kv is \(4, 2\), which makes 0\.v \(3, 2\); config\.json asks'
    ):
        native(weights, expected={**EXPECTED, '0.v': torch.Size([5, 2])})


def test_a_weight_of_whole_numbers_is_refused(weights):
    whole = Weight((3, 2), torch.int8, weights['emb.weight'].file, lambda: torch.ones(3, 2, dtype=torch.int8))
    with pytest.raises(ModelError, match=r'a\.safetensors: emb\.weight holds int8.*expected floating-point weights'):
        native({**weights, 'emb.weight': whole})


def test_a_weight_that_grew_has_no_place_in_the_original(weights):
    grown = {**native(weights), 'embed.weight': torch.zeros(4, 2)}
    with pytest.raises(ModelError, match=r'emb\.weight was \(3, 2\) and is \(4, 2\) now.*--format hf'):
        list(to_original(grown, source=weights, layout=LAYOUT, config=CONFIG))
