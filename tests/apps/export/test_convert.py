"""``pth_to_hf``: what a run trained is loaded by PEFT and transformers, and has the logits of the run."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.data import Processor
from vlmtune.models import load_model

LORA = dict(llm='lora')
WITH_PROJECTOR = dict(llm='lora', projector='full')
# (family, tune, further settings of the run, what is saved whole); every way in which parts can be put into an adapter
ADAPTERS = [
    ('llama', LORA, {}, None),
    ('llama', LORA, dict(lora=dict(use_dora=True)), None),
    ('llava', LORA, dict(lora=dict(use_rslora=True)), None),
    ('llava', WITH_PROJECTOR, {}, ['model.multi_modal_projector']),
    ('llava', dict(vision_encoder='lora', projector='lora', llm='lora'), {}, None),
    ('llava', dict(vision_encoder='lora', llm='full'), {}, ['model.language_model', 'lm_head']),
    ('llava', dict(embeddings='full', lm_head='full', llm='lora'), {}, ['embed_tokens', 'lm_head']),
    ('qwen2_5_vl', LORA, {}, None),
    ('qwen2_5_vl', WITH_PROJECTOR, dict(lora=dict(use_dora=True)), ['model.visual.merger']),
    (
        'qwen2_5_vl',
        dict(vision_encoder='full', llm='lora'),
        {},
        ['model.visual.patch_embed', 'model.visual.blocks.0', 'model.visual.blocks.1'],
    ),
    (
        'qwen3_vl',
        WITH_PROJECTOR,
        {},
        ['model.visual.merger', *(f'model.visual.deepstack_merger_list.{i}' for i in range(2))],
    ),
    ('llava_next', WITH_PROJECTOR, {}, ['model.multi_modal_projector']),
    ('llava_onevision', dict(vision_encoder='lora', projector='full', llm='lora'), {}, ['model.multi_modal_projector']),
    ('gemma3', WITH_PROJECTOR, {}, ['model.multi_modal_projector']),
    ('paligemma', dict(vision_encoder='lora', projector='lora', llm='lora'), {}, None),
    ('llama', dict(embeddings='full', llm='lora'), dict(model_options=dict(tie_word_embeddings=True)), None),
    ('qwen2_vl', dict(vision_encoder='lora', projector='full', llm='lora'), {}, ['model.visual.merger']),
    ('internvl', WITH_PROJECTOR, {}, ['model.multi_modal_projector']),
]


def load_base(path, *, has_vision):
    return (AutoModelForImageTextToText if has_vision else AutoModelForCausalLM).from_pretrained(path)


@pytest.mark.parametrize(
    ('family', 'tune', 'settings', 'modules'),
    ADAPTERS,
    ids=[f'{a}-{"-".join(b)}-{i}' for i, (a, b, *_) in enumerate(ADAPTERS)],
)
def test_adapter_reloads_equal_through_peft(trained_run, tmp_path, family, tune, settings, modules):
    run = trained_run(family, **settings, **tune)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    base = load_base(run.base, has_vision=run.processor.family.has_vision)
    plain = run.logits(base)
    adapted = PeftModel.from_pretrained(base, tmp_path / 'adapter')
    assert (run.logits(adapted) - run.logits()).abs().max() == 0.0
    assert (plain - run.logits()).abs().max() > 1e-3  # the run did move the model
    written = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
    assert set(written) == set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == run.base
    assert isinstance(config['target_modules'], list)  # engines refuse PEFT's regular expressions
    if modules is not None:
        assert config['modules_to_save'] == modules


@pytest.mark.parametrize(('family', 'short'), [('llama', True), ('qwen3_vl', True), ('llava', False)])
def test_target_modules_are_last_names_where_those_reach_nothing_else(trained_run, tmp_path, family, short):
    run = trained_run(family, llm=dict(mode='lora', target_modules=['q_proj', 'v_proj']))
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    targets = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())['target_modules']
    assert (targets == ['q_proj', 'v_proj']) == short
    assert short or all(name.startswith('model.language_model.layers.') for name in targets)


@pytest.mark.parametrize('family', ['llava', 'qwen2_5_vl', 'llama'])
def test_qlora_adapter_reloads_equal_on_a_quantised_base(trained_run, tmp_path, family):
    tune = LORA if family == 'llama' else WITH_PROJECTOR
    run = trained_run(family, quantization='nf4', **tune)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    base, _ = load_model(run.base, dtype=torch.float32, quantization='nf4')
    assert (run.logits(PeftModel.from_pretrained(base, tmp_path / 'adapter')) - run.logits()).abs().max() == 0.0
    record = json.loads((tmp_path / 'adapter' / 'vlmtune_export.json').read_text())
    assert (record['family'], record['quantization'], record['dtype']) == (family, 'nf4', 'float32')


def test_new_tokens_come_with_the_adapter(trained_run, tmp_path):
    tune = dict(llm='lora', embeddings='full', lm_head='full')
    run = trained_run('qwen2_5_vl', special_tokens=('<ref>', '</ref>'), **tune)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    rows = json.loads((tmp_path / 'adapter' / 'vlmtune_export.json').read_text())['vocab_size']
    base = load_base(run.base, has_vision=True)
    assert rows == run.logits().shape[-1] == base.get_input_embeddings().weight.shape[0] + 2
    base.resize_token_embeddings(rows)
    adapted = PeftModel.from_pretrained(base, tmp_path / 'adapter')
    assert (run.logits(adapted) - run.logits()).abs().max() == 0.0
    assert f'base.resize_token_embeddings({rows})' in (tmp_path / 'adapter' / 'README.md').read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / 'adapter').convert_tokens_to_ids('<ref>') > 0


FULL = [
    ('llava', dict(vision_encoder='full', projector='full', llm='full'), {}),
    ('llava', dict(projector='full'), {}),
    ('qwen2_5_vl', dict(vision_encoder='full', projector='full', llm='full'), {}),
    ('llama', dict(llm='full'), {}),
    ('llava_next', dict(projector='full', llm='full'), {}),
    ('llava_onevision', dict(vision_encoder='full', projector='full', llm='full'), {}),
    ('gemma3', dict(projector='full', llm='full'), {}),
    ('paligemma', dict(projector='full', llm='full'), {}),
    ('llama', dict(llm='full'), dict(model_options=dict(tie_word_embeddings=True))),
    ('qwen2_5_vl', dict(llm='full'), dict(special_tokens=('<ref>',))),
]


@pytest.mark.parametrize(('family', 'tune', 'settings'), FULL)
def test_full_model_reloads_equal_through_auto_classes(trained_run, tmp_path, family, tune, settings):
    run = trained_run(family, **settings, **tune)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'model'))
    auto = AutoModelForImageTextToText if run.processor.family.has_vision else AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / 'model', output_loading_info=True)
    assert not any(info.values())
    assert (run.logits(model) - run.logits()).abs().max() == 0.0
    tied = family in ('gemma3', 'paligemma') or 'tie_word_embeddings' in settings.get('model_options', {})
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert Processor(str(tmp_path / 'model')).tokenizer.chat_template == run.processor.tokenizer.chat_template


def test_full_model_keeps_the_dtype_of_its_base_unless_told(trained_run, tmp_path):
    run = trained_run('llama', llm='full', model_options=dict(dtype='bfloat16'))
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'own'))
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'wide'), dtype='float32')
    own, wide = (load_file(tmp_path / name / 'model.safetensors') for name in ('own', 'wide'))
    name = 'model.layers.0.mlp.up_proj.weight'
    trained = run.model.named_trainable()[name]
    assert {t.dtype for t in own.values()} == {torch.bfloat16}
    assert torch.equal(wide[name], trained)  # straight from the float32 of training, not through bfloat16
    assert torch.equal(own[name], trained.bfloat16())


def test_adapter_is_float32_unless_told(trained_run, tmp_path):
    run = trained_run('llava', model_options=dict(dtype='bfloat16'), **WITH_PROJECTOR)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'a'))
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'b'), dtype='bfloat16')
    for name, dtype in (('a', torch.float32), ('b', torch.bfloat16)):
        tensors = load_file(tmp_path / name / 'adapter_model.safetensors')
        assert {t.dtype for t in tensors.values()} == {dtype}


def test_shards_have_the_size_that_was_asked_for(trained_run, tmp_path):
    run = trained_run('llama', llm='full')
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'model'), max_shard_size='200KB')
    assert len(list((tmp_path / 'model').glob('model-*.safetensors'))) > 1
    assert (run.logits(load_base(tmp_path / 'model', has_vision=False)) - run.logits()).abs().max() == 0.0


def test_processor_files_are_those_that_were_trained_with(trained_run, tmp_path):
    run = trained_run('llava', **WITH_PROJECTOR)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    names = {path.name for path in (tmp_path / 'adapter').iterdir()}
    assert {'preprocessor_config.json', 'processor_config.json', 'chat_template.jinja', 'tokenizer.json'} <= names
    processor = AutoProcessor.from_pretrained(tmp_path / 'adapter')
    assert processor.tokenizer.chat_template == run.processor.tokenizer.chat_template  # vicuna, not the base's own


def test_generation_config_is_carried_over_and_gains_the_stop_tokens_of_the_template(
    trained_run, tmp_path, rewrite_base
):
    run = trained_run('llama', llm='full')
    base = tmp_path / 'base'
    shutil.copytree(run.base, base)
    settings = dict(eos_token_id=[9, 8], do_sample=False, temperature=0.7)  # transformers would not save these two
    (base / 'generation_config.json').write_text(json.dumps(settings))
    path = rewrite_base(run, base, tmp_path)
    pth_to_hf(run.config, str(path), str(tmp_path / 'model'))
    written = json.loads((tmp_path / 'model' / 'generation_config.json').read_text())
    more = run.processor.stop_token_ids()
    assert more
    assert written == {**settings, 'eos_token_id': [9, 8, *more]}


def test_model_card_says_what_was_trained(trained_run, tmp_path):
    run = trained_run('llava', **WITH_PROJECTOR)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    card = (tmp_path / 'adapter' / 'README.md').read_text()
    assert 'base_model' not in card  # a folder is no hub id
    assert '| projector | full | 6,272 |' in card
    assert '`recipe`' in card
    assert '`squares.json`' in card
    assert '/data' not in card
    assert 'PeftModel.from_pretrained' in card


def test_an_empty_folder_is_used(trained_run, tmp_path):
    run = trained_run('llama', **LORA)
    (tmp_path / 'out').mkdir()
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'out'))
    usual = tmp_path / 'usual'
    usual.touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / 'out').iterdir()}
    assert modes['adapter_model.safetensors'] == modes['README.md'] == usual.stat().st_mode
    assert not list(tmp_path.glob('.*'))
