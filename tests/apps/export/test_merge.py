import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmtune.apps.chat.answering import load_answerer
from vlmtune.apps.demo.voices import load_voices
from vlmtune.apps.export.check import findings
from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.export.merge import merge
from vlmtune.apps.serve import serve
from vlmtune.data import Processor
from vlmtune.utils.errors import CheckpointError, ConfigError, ModelError

LORA = dict(llm='lora')
WITH_PROJECTOR = dict(llm='lora', projector='full')
NEW_TOKENS = dict(special_tokens=('<ref>', '</ref>'))
TIED = dict(model_options=dict(tie_word_embeddings=True))
TOLERANCE = 2.5e-6  # of the largest logit, in float32: one product instead of two
CASES = [
    ('llama', LORA, {}),
    ('llama', LORA, dict(lora=dict(use_dora=True))),
    ('llama', LORA, dict(quantization='nf4')),
    ('llama', LORA, TIED),
    ('llama', dict(llm='lora', embeddings='full'), TIED),
    ('llava', LORA, {}),
    ('llava', WITH_PROJECTOR, {}),
    ('llava', WITH_PROJECTOR, dict(quantization='nf4')),
    ('llava', dict(vision_encoder='full', projector='lora', llm='lora'), dict(lora=dict(use_rslora=True))),
    ('qwen2_5_vl', LORA, {}),
    ('qwen2_5_vl', WITH_PROJECTOR, {}),
    ('qwen2_5_vl', WITH_PROJECTOR, dict(quantization='nf4')),
    ('qwen2_5_vl', dict(llm='lora', embeddings='full', lm_head='full'), NEW_TOKENS),
    ('qwen2_5_vl', dict(llm='lora', embeddings='full', lm_head='full'), {**NEW_TOKENS, 'quantization': 'nf4'}),
    ('llava', dict(llm='lora', embeddings='full'), {**NEW_TOKENS, **TIED}),
    ('llava_next', WITH_PROJECTOR, dict(quantization='nf4')),
    ('llava_onevision', LORA, {}),
    ('gemma3', WITH_PROJECTOR, {}),
    ('paligemma', WITH_PROJECTOR, {}),
    ('qwen2_vl', dict(llm='lora', embeddings='full'), {**NEW_TOKENS, **TIED}),
    ('qwen3_vl', WITH_PROJECTOR, {}),
    ('internvl', WITH_PROJECTOR, {}),
]


def load(path, *, has_vision, **options):
    return (AutoModelForImageTextToText if has_vision else AutoModelForCausalLM).from_pretrained(path, **options)


@pytest.mark.parametrize(('family', 'tune', 'settings'), CASES, ids=[f'{case[0]}-{i}' for i, case in enumerate(CASES)])
def test_merged_model_gives_the_logits_of_the_trained_one(trained_run, tmp_path, family, tune, settings):
    run = trained_run(family, **settings, **tune)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu')
    model, info = load(tmp_path / 'merged', has_vision=run.processor.family.has_vision, output_loading_info=True)
    assert not any(info.values())
    want = run.logits()
    assert (run.logits(model) - want).abs().max() <= TOLERANCE * max(1.0, want.abs().max().item())
    assert not hasattr(model.config, 'quantization_config')
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in ('gemma3', 'paligemma', 'internvl') or 'model_options' in settings)
    assert tied or not model.config.tie_word_embeddings


def test_a_quantised_adapter_merged_into_the_plain_base_would_be_another_model(trained_run, tmp_path):
    """The negative control of the QLoRA cases above: without the record, the rounding stays uncorrected."""
    run = trained_run('llama', quantization='nf4', **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    (tmp_path / 'adapter' / 'vlmtune_export.json').unlink()
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu')
    assert (run.logits(load(tmp_path / 'merged', has_vision=False)) - run.logits()).abs().max() > 1e-3


def test_an_int8_adapter_is_merged_within_the_rounding_of_its_activations(trained_run, tmp_path):
    run = trained_run('llama', quantization='int8', **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu')
    assert (run.logits(load(tmp_path / 'merged', has_vision=False)) - run.logits()).abs().max() < 0.02


def test_updates_are_added_in_float32_and_rounded_once(trained_run, tmp_path):
    run = trained_run('llama', dtype='bfloat16', model_options=dict(dtype='bfloat16'), **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu')
    written = load_file(tmp_path / 'merged' / 'model.safetensors')
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    name = 'model.layers.0.mlp.up_proj'
    trained = run.model.named_trainable()
    base = load_file(Path(run.base) / 'model.safetensors')[f'{name}.weight']
    a, b = (trained[f'{name}.lora_{side}.default.weight'].detach() for side in 'AB')
    exact = base.float() + (run.model.lora_config.lora_alpha / run.model.lora_config.r) * (b @ a)
    assert torch.equal(written[f'{name}.weight'], exact.bfloat16())


def test_modules_that_were_trained_in_full_are_not_rounded_to_the_dtype_of_the_base(trained_run, tmp_path):
    run = trained_run('llava', dtype='bfloat16', model_options=dict(dtype='bfloat16'), **WITH_PROJECTOR)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), dtype='float32', device='cpu')
    projector = load(tmp_path / 'merged', has_vision=True).model.multi_modal_projector
    trained = run.model.named_trainable()
    assert torch.equal(projector.linear_1.weight, trained['model.multi_modal_projector.linear_1.weight'])


def test_dtype_can_be_chosen(trained_run, tmp_path):
    run = trained_run('llama', **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), dtype='float16', max_shard_size='100KB')
    shards = list((tmp_path / 'merged').glob('model-*.safetensors'))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.float16}


# ---- adapters that others made


@pytest.fixture
def foreign_adapter(tiny_model, tmp_path):
    """As PEFT writes it, for the language model of a tiny LLaVA: (base, adapter, the adapted model)."""
    base = tiny_model('llava')
    adapted = get_peft_model(load(base, has_vision=True), LoraConfig(r=4, target_modules=['gate_proj', 'down_proj']))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / 'foreign')
    return base, tmp_path / 'foreign', adapted


def test_an_adapter_of_others_is_merged_and_the_base_gives_the_processor(foreign_adapter, tmp_path):
    base, adapter, adapted = foreign_adapter
    merge(str(base), str(adapter), str(tmp_path / 'merged'), device='cpu')
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        got = load(tmp_path / 'merged', has_vision=True).eval()(input_ids=ids).logits
        want = adapted.eval()(input_ids=ids).logits
    assert (got - want).abs().max() <= TOLERANCE
    names = {path.name for path in (tmp_path / 'merged').iterdir()}
    assert {'preprocessor_config.json', 'processor_config.json', 'chat_template.jinja', 'tokenizer.json'} <= names
    template = Processor(str(base)).tokenizer.chat_template
    assert Processor(str(tmp_path / 'merged')).tokenizer.chat_template == template
    assert 'base_model: ' not in (tmp_path / 'merged' / 'README.md').read_text()


def test_the_processor_of_the_adapter_wins(trained_run, tmp_path):
    run = trained_run('llava', **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    path = tmp_path / 'adapter' / 'preprocessor_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(image_mean=[0.5, 0.5, 0.5])))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu')
    processor = Processor(str(tmp_path / 'merged'))
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5]
    assert processor.tokenizer.chat_template == run.processor.tokenizer.chat_template
    card = (tmp_path / 'merged' / 'README.md').read_text()
    assert '| llm | lora | 8,192 |' in card


@pytest.mark.parametrize('newer', ['adapter', 'base'])
def test_image_settings_of_an_adapter_win_in_whatever_file_they_are(foreign_adapter, tmp_path, newer):
    """transformers 5 writes them into processor_config.json, and reads that before preprocessor_config.json."""
    source, adapter, _ = foreign_adapter
    base = tmp_path / 'base'
    shutil.copytree(source, base)
    older, joint = (json.loads((base / f'{name}_config.json').read_text()) for name in ('preprocessor', 'processor'))
    changed = older | dict(image_mean=[0.25, 0.25, 0.25])
    if newer == 'adapter':
        (adapter / 'processor_config.json').write_text(json.dumps(joint | dict(image_processor=changed)))
    else:
        (base / 'processor_config.json').write_text(json.dumps(joint | dict(image_processor=older)))
        (adapter / 'preprocessor_config.json').write_text(json.dumps(changed))
    merge(str(base), str(adapter), str(tmp_path / 'merged'), device='cpu')
    assert list(Processor(str(tmp_path / 'merged')).image_processor.image_mean) == [0.25, 0.25, 0.25]
    for name in ('preprocessor_config.json', 'processor_config.json'):
        content = json.loads((tmp_path / 'merged' / name).read_text())
        assert content.get('image_processor', content).get('image_mean', [0.25] * 3) == [0.25] * 3


# ---- what cannot be merged


def refused(base, adapter, tmp_path, error, match, *, output='merged', **options):
    with pytest.raises(error, match=match) as caught:
        merge(str(base), str(adapter), str(tmp_path / output), **options)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('.*'))
    assert output != 'merged' or not (tmp_path / 'merged').exists()


def test_missing_and_foreign_folders_are_refused(foreign_adapter, tmp_path):
    base, adapter, _ = foreign_adapter
    refused(tmp_path / 'none', adapter, tmp_path, ModelError, 'no model at')
    refused(base, tmp_path / 'none', tmp_path, CheckpointError, 'no adapter at')
    refused(base, base, tmp_path, CheckpointError, 'adapter_config.json')
    refused(base, adapter, tmp_path, CheckpointError, 'not empty', output='foreign')
    refused(base, adapter, tmp_path, ConfigError, 'has no original layout; write --format hf', file_format='original')
    refused(base, adapter, tmp_path, ConfigError, 'cpu, cuda or auto', device='tpu')


def test_a_checkpoint_is_told_from_an_export(trained_run, tmp_path):
    run = trained_run('llama', **LORA)
    doors = (
        lambda folder: merge(run.base, folder, str(tmp_path / 'merged')),
        lambda folder: list(findings(folder)),
        serve,
        load_answerer,
        load_voices,
        lambda folder: load_voices(run.base, compare=folder),
    )
    for door in doors:
        with pytest.raises(CheckpointError, match='is a checkpoint; write it first: vlmtune convert pth_to_hf CONFIG'):
            door(run.checkpoint)


def test_an_output_that_cannot_be_made_is_told_before_any_work(foreign_adapter, tmp_path):
    base, adapter, _ = foreign_adapter
    (tmp_path / 'file').write_text('')
    refused(base, adapter, tmp_path, CheckpointError, 'cannot be made: .*file is no folder', output='file/merged')


def test_an_adapter_without_safetensors_or_of_another_kind_is_refused(foreign_adapter, tmp_path):
    base, adapter, _ = foreign_adapter
    config = adapter / 'adapter_config.json'
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | dict(peft_type='PROMPT_TUNING')))
    refused(base, adapter, tmp_path, CheckpointError, 'PROMPT_TUNING')
    config.write_text('not json')
    refused(base, adapter, tmp_path, CheckpointError, 'not valid json')
    config.write_text(json.dumps(settings))
    weights = adapter / 'adapter_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:50])
    refused(base, adapter, tmp_path, CheckpointError, 'does not fit')
    weights.rename(adapter / 'adapter_model.bin')
    refused(base, adapter, tmp_path, CheckpointError, 'has no adapter_model.safetensors')


def test_a_link_that_leads_out_of_the_adapter_is_not_followed(foreign_adapter, tmp_path):
    base, adapter, _ = foreign_adapter
    (tmp_path / 'key').write_text('private')
    (adapter / 'vocab.json').symlink_to(tmp_path / 'key')
    refused(base, adapter, tmp_path, CheckpointError, 'vocab.json is a link that leads out of')


def test_an_adapter_that_matches_no_module_is_refused(foreign_adapter, tmp_path):
    base, adapter, _ = foreign_adapter
    config = adapter / 'adapter_config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(target_modules=['nothing_like_it'])))
    refused(base, adapter, tmp_path, CheckpointError, 'does not fit')


def test_of_an_adapter_of_other_shapes_the_first_is_told_whole(foreign_adapter, tmp_path):
    base, adapter, _ = foreign_adapter
    config = adapter / 'adapter_config.json'
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | dict(r=settings['r'] + 1)))
    refused(
        base, adapter, tmp_path, CheckpointError, r'does not fit .*size mismatch .*is torch.Size\(\[\d+, \d+\]\)\.$'
    )


def test_an_adapter_whose_tensors_have_no_place_is_refused(foreign_adapter, tmp_path):
    """As one that was trained through a text-only class: PEFT alone loads it and silently does nothing."""
    base, adapter, _ = foreign_adapter
    weights = adapter / 'adapter_model.safetensors'
    tensors = {name.replace('model.language_model', 'model'): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {'format': 'pt'})
    refused(base, adapter, tmp_path, CheckpointError, 'have no place')


def test_an_adapter_of_another_family_is_refused(trained_run, tiny_model, tmp_path):
    run = trained_run('llava', **LORA)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    refused(tiny_model('qwen2_5_vl'), tmp_path / 'adapter', tmp_path, CheckpointError, 'trained on a llava model')


def test_an_update_that_is_not_finite_is_refused(foreign_adapter, tmp_path):
    base, adapter, _ = foreign_adapter
    weights = adapter / 'adapter_model.safetensors'
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float('nan')
    save_file(tensors, weights, {'format': 'pt'})
    refused(base, adapter, tmp_path, CheckpointError, 'NaN')
