"""``--format original``: what loads the base loads the export, because nothing but values of weights is another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.export.merge import merge
from vlmtune.apps.export.model_card import write_card
from vlmtune.apps.export.original import changed_files, write_original
from vlmtune.data import Processor
from vlmtune.families import find_family
from vlmtune.layouts import find_layout, open_weights
from vlmtune.models import load_model
from vlmtune.models.lazy_model import LazyModel
from vlmtune.testing import list_tiny_originals
from vlmtune.utils.errors import ConfigError

LORA = dict(llm='lora')
# bfloat16 weights: the update is added in float32 and rounded once, where training adds it to the activations.
ROUNDING = 0.05  # of the largest logit
WEIGHTS = ('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')


def tensors_of(folder):
    return {name: tensor for file in WEIGHTS for name, tensor in load_file(folder / file).items()}


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


def assert_same_files(base, written):
    names = {path.name for path in base.iterdir()} - {'.hidden'}
    assert {path.name for path in written.iterdir()} == names
    for name in names - {*WEIGHTS, 'README.md'}:
        assert (written / name).read_bytes() == (base / name).read_bytes(), name
    for name in WEIGHTS:
        with safe_open(base / name, 'pt') as old, safe_open(written / name, 'pt') as new:
            assert set(old.keys()) == set(new.keys())
            assert old.metadata() == new.metadata() == {'format': 'pt'}


@pytest.fixture(scope='module')
def run(trained_run, internlm2):
    return trained_run('internlm2', base=internlm2, **LORA)


@pytest.fixture(scope='module')
def adapter(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('adapter') / 'adapter'
    pth_to_hf(run.config, run.checkpoint, str(folder))
    return folder


@pytest.fixture(scope='module')
def merged(internlm2, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp('merged') / 'merged'
    merge(str(internlm2), str(adapter), str(folder), device='cpu', file_format='original')
    return folder


# ---- the same, bit by bit


def test_what_was_not_trained_comes_back_bit_by_bit(internlm2, adapter, tmp_path):
    """An adapter of zeros: the model passes through bfloat16, and the norms are float32 in the file."""
    shutil.copytree(adapter, tmp_path / 'adapter')
    path = tmp_path / 'adapter' / 'adapter_model.safetensors'
    zeros = {n: torch.zeros_like(t) if 'lora_B' in n else t for n, t in load_file(path).items()}
    save_file(zeros, path, {'format': 'pt'})
    merge(str(internlm2), str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu', file_format='original')
    assert_same_files(internlm2, tmp_path / 'merged')
    old, new = tensors_of(internlm2), tensors_of(tmp_path / 'merged')
    assert {tensor.dtype for tensor in old.values()} == {torch.float32, torch.bfloat16}
    assert old.keys() == new.keys()
    assert all(bits(old[name]) == bits(new[name]) for name in old)


def test_files_of_torch_save_become_safetensors_of_the_same_tensors(internlm2, adapter, tmp_path):
    base = shutil.copytree(internlm2, tmp_path / 'base')
    places = {}
    for file in WEIGHTS:
        name = file.replace('model-', 'pytorch_model-').replace('.safetensors', '.bin')
        tensors = load_file(base / file)
        torch.save(tensors, base / name)
        places |= dict.fromkeys(tensors, name)
        (base / file).unlink()
    (base / 'model.safetensors.index.json').unlink()
    (base / 'pytorch_model.bin.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    merge(str(base), str(adapter), str(tmp_path / 'merged'), device='cpu', file_format='original')
    index = json.loads((tmp_path / 'merged' / 'model.safetensors.index.json').read_text())
    assert index['weight_map'] == {
        n: p.replace('pytorch_', '').replace('.bin', '.safetensors') for n, p in places.items()
    }
    assert not list((tmp_path / 'merged').glob('*.bin*'))
    old, new = tensors_of(internlm2), tensors_of(tmp_path / 'merged')
    assert index['metadata']['total_size'] == sum(t.numel() * t.element_size() for t in new.values())
    assert {n: (t.dtype, t.shape) for n, t in new.items()} == {n: (t.dtype, t.shape) for n, t in old.items()}


# ---- trained, and back in the original


def test_a_merged_model_has_the_files_of_its_base_and_the_logits_of_the_trained_one(internlm2, run, merged):
    assert_same_files(internlm2, merged)
    old, new = tensors_of(internlm2), tensors_of(merged)
    assert {n: (t.dtype, t.shape) for n, t in new.items()} == {n: (t.dtype, t.shape) for n, t in old.items()}
    moved = {name.split('.', 3)[-1] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {'attention.wqkv.weight', 'attention.wo.weight', *(f'feed_forward.w{i}.weight' for i in (1, 2, 3))}
    model, _ = load_model(str(merged), dtype=torch.float32)
    plain, _ = load_model(str(internlm2), dtype=torch.float32)
    want = run.logits()
    assert (run.logits(model) - want).abs().max() < ROUNDING * want.abs().max()
    assert (run.logits(plain) - want).abs().max() > 5 * ROUNDING * want.abs().max()


def test_the_same_adapter_merged_for_transformers(internlm2, run, adapter, merged, tmp_path):
    """The default, as transformers has the family under another name."""
    merge(str(internlm2), str(adapter), str(tmp_path / 'hf'), device='cpu')
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    original, _ = load_model(str(merged), dtype=torch.bfloat16)  # in which the norms are float32
    assert type(model).__name__ == 'LlamaForCausalLM'
    assert torch.equal(run.logits(model), run.logits(original.float()))
    assert not list((tmp_path / 'hf').glob('*.py'))
    assert run.processor.stop_token_ids([2]) == sorted(model.generation_config.eos_token_id)


def test_a_model_that_was_trained_in_full(internlm2, trained_run, tmp_path):
    run = trained_run('internlm2', base=internlm2, llm='full', embeddings='frozen')
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'original'), file_format='original')
    assert_same_files(internlm2, tmp_path / 'original')
    old, new = tensors_of(internlm2), tensors_of(tmp_path / 'original')
    fused = new['model.layers.1.attention.wqkv.weight']
    trained = run.model.named_trainable()
    queries = trained['model.layers.1.self_attn.q_proj.weight'].detach().bfloat16()
    each = queries.shape[0] // run.model.model.config.num_key_value_heads
    assert torch.equal(fused[:each], queries[:each])  # of the first key head come first
    norm = 'model.layers.1.attention_norm.weight'
    assert new[norm].dtype == torch.float32
    assert not torch.equal(new[norm], old[norm])
    assert torch.equal(new['model.tok_embeddings.weight'], old['model.tok_embeddings.weight'])  # frozen


def test_a_quantised_adapter_is_merged_with_the_rounding_that_it_corrects(internlm2, trained_run, tmp_path):
    run = trained_run('internlm2', base=internlm2, quantization='nf4', **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    merge(str(internlm2), str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu', file_format='original')
    model, _ = load_model(str(tmp_path / 'merged'), dtype=torch.float32)
    want = run.logits()
    assert (run.logits(model) - want).abs().max() < ROUNDING * want.abs().max()


@pytest.mark.parametrize('name', list_tiny_originals())
def test_every_family_comes_back_as_it_was_stored(name, trained_run, tmp_path):
    run = trained_run(name, **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu', file_format='original')
    old, new = open_weights(Path(run.base)), open_weights(tmp_path / 'merged')
    assert [(n, w.shape, w.dtype) for n, w in old.items()] == [(n, w.shape, w.dtype) for n, w in new.items()]
    same = {name for name in old if torch.equal(old[name].read(), new[name].read())}
    assert 0 < len(same) < len(old)
    model, family = load_model(str(tmp_path / 'merged'), dtype=torch.float32)
    want = run.logits()
    assert (run.logits(model) - want).abs().max() < 2.5e-6 * max(1.0, want.abs().max().item())
    assert 'does not fit' in (tmp_path / 'adapter' / 'README.md').read_text()
    if family.model is not None:
        with pytest.raises(ConfigError, match='--format hf: transformers has no .*; write --format original'):
            merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'hf'), device='cpu', file_format='hf')


# ---- cards


def test_the_card_of_an_adapter_says_that_it_does_not_fit_its_base(adapter, internlm2):
    card = (adapter / 'README.md').read_text()
    assert 'This adapter does not fit the files of its base model' in card
    assert '`internlm2-tiny` lies in the layout of InternLM2' in card
    assert '`attention.wqkv`' in card
    assert 'vlmtune convert merge internlm2-tiny path/to/this/folder OUT --format original' in card
    assert 'from_pretrained' not in card


def test_the_card_of_an_original_is_not_that_of_its_base(merged):
    card = (merged / 'README.md').read_text()
    assert 'the card of the base' not in card
    assert 'This is `internlm2-tiny` with other weights' in card
    assert 'chat template' not in card
    assert 'AutoModel' not in card


def test_another_chat_template_is_written_and_told(internlm2, adapter, tmp_path, caplog):
    shutil.copytree(adapter, tmp_path / 'adapter')
    (tmp_path / 'adapter' / 'chat_template.jinja').write_text("{{ messages[0]['content'] }}")
    merge(str(internlm2), str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu', file_format='original')
    assert (tmp_path / 'merged' / 'chat_template.jinja').read_text() == "{{ messages[0]['content'] }}"
    assert 'pass `chat_template.jinja`' in (tmp_path / 'merged' / 'README.md').read_text()
    assert 'trained with another chat template' in caplog.text
    assert Processor(str(tmp_path / 'merged')).tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize('older', [True, False])
def test_the_image_limit_of_the_training_is_written_where_the_base_has_one(older, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model('points'), tmp_path / 'base')
    path = base / 'preprocessor_config.json'
    raw = json.loads(path.read_text())
    if not older:
        raw['size'] = {'shortest_edge': raw.pop('min_pixels'), 'longest_edge': raw.pop('max_pixels')}
        path.write_text(json.dumps(raw))
    model, _ = load_model(str(base))
    Processor(str(base), image_processor={'max_pixels': 6272}).save(tmp_path / 'trained')
    changed = changed_files(str(base), over=tmp_path / 'trained')
    (tmp_path / 'out').mkdir()
    layout = find_layout(str(base))
    write_original(LazyModel.of(model), tmp_path / 'out', base=str(base), layout=layout, files=changed.files)
    (raw if older else raw['size'])['max_pixels' if older else 'longest_edge'] = 6272
    assert json.loads((tmp_path / 'out' / 'preprocessor_config.json').read_text()) == raw
    limits = Processor(str(tmp_path / 'out')).image_processor.size
    assert (limits['shortest_edge'], limits['longest_edge']) == (3136, 6272)
    options = dict(family=find_family('points'), base=str(base), record=None, is_original=True)
    write_card(tmp_path / 'out', 'merged', note=changed.note, **options)
    assert (
        '`preprocessor_config.json` is no copy: it has the image limits of the training'
        in (tmp_path / 'out/README.md').read_text()
    )


def test_image_settings_that_the_files_of_the_base_cannot_say_are_told(tiny_model, tmp_path, caplog):
    base = str(tiny_model('minicpmv2'))
    Processor(base).save(tmp_path / 'same')
    assert changed_files(base, over=tmp_path / 'same') == ({}, '')
    assert 'image settings' not in caplog.text
    Processor(base, image_processor={'max_slice_nums': 2}).save(tmp_path / 'other')
    files, note = changed_files(base, over=tmp_path / 'other')
    assert not files
    for told in (caplog.text, note):
        assert 'trained with the image settings' in told
        assert "{'max_slice_nums': 2}" in told


# ---- what cannot be written


def test_the_hubs_cache_is_made_of_links(internlm2, adapter, tmp_path):
    cache = tmp_path / 'models--org--name'
    base = cache / 'snapshots' / ('0' * 40)
    (cache / 'blobs').mkdir(parents=True)
    base.mkdir(parents=True)
    for file in Path(internlm2).iterdir():
        shutil.copyfile(file, cache / 'blobs' / file.name)
        (base / file.name).symlink_to(Path('../../blobs') / file.name)
    merge(str(base), str(adapter), str(tmp_path / 'merged'), device='cpu', file_format='original')
    assert_same_files(internlm2, tmp_path / 'merged')
    assert not any(path.is_symlink() for path in (tmp_path / 'merged').iterdir())
