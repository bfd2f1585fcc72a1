"""With an adapter a base answers as the trained model did; what does not fit together is told."""

import importlib.util

import pytest
import torch

from vlmtune.apps.chat.answering import load_answerer
from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.utils.errors import CheckpointError

ADAPTED = [
    ('llama', dict(llm='lora')),
    ('llava', dict(llm='lora', projector='full')),
    ('llava', dict(llm='lora', vision_encoder='full')),
    ('qwen2_5_vl', dict(llm='full', vision_encoder='lora')),
]


@pytest.mark.parametrize(('family', 'tune'), ADAPTED)
def test_an_adapter_answers_as_the_trained_model(trained_run, tmp_path, family, tune):
    run = trained_run(family, dtype='bfloat16', model_options=dict(dtype='bfloat16'), **tune)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    answerer = load_answerer(run.base, adapter=str(tmp_path / 'adapter'))
    assert (run.logits(answerer.model) - run.logits()).abs().max() == 0.0
    assert answerer.autocast_dtype is torch.bfloat16
    assert answerer.processor.tokenizer.chat_template == run.processor.tokenizer.chat_template


def test_the_folder_of_an_adapter_means_its_base_and_the_adapter(trained_run, tmp_path):
    run = trained_run('llava', llm='lora')
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    answerer = load_answerer(str(tmp_path / 'adapter'))
    assert (run.logits(answerer.model) - run.logits()).abs().max() == 0.0


def test_an_adapter_of_a_quantised_base_gets_one_unless_told_otherwise(trained_run, tmp_path):
    run = trained_run('llama', quantization='nf4', llm='lora')
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    own = load_answerer(run.base, adapter=str(tmp_path / 'adapter'))
    assert (run.logits(own.model) - run.logits()).abs().max() == 0.0
    eight = load_answerer(run.base, adapter=str(tmp_path / 'adapter'), bits=8)
    assert (run.logits(eight.model) - run.logits()).abs().max() > 1e-4


def test_a_quantised_base_that_cannot_be_had_is_told(trained_run, tmp_path, monkeypatch, caplog):
    run = trained_run('llama', quantization='nf4', llm='lora')
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'bitsandbytes' else find(name))
    answerer = load_answerer(run.base, adapter=str(tmp_path / 'adapter'))
    assert 'was trained on an nf4 base; without bitsandbytes answers differ' in caplog.text
    assert not hasattr(answerer.model, 'hf_quantizer')


def test_new_tokens_of_an_adapter_are_known(trained_run, tmp_path):
    tune = dict(llm='lora', embeddings='full', lm_head='full')
    run = trained_run('qwen2_5_vl', special_tokens=('<ref>', '</ref>'), **tune)
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    answerer = load_answerer(run.base, adapter=str(tmp_path / 'adapter'))
    assert (run.logits(answerer.model) - run.logits()).abs().max() == 0.0
    assert '<ref>' in answerer.processor.tokenizer.get_added_vocab()


@pytest.mark.parametrize('other', ['llama', 'qwen2_vl', 'llava_next'])
def test_an_adapter_for_another_base_is_told_with_both_names(trained_run, tiny_model, tmp_path, other):
    run = trained_run('llava', llm='lora', projector='full')
    adapter, base = tmp_path / 'adapter', str(tiny_model(other))
    pth_to_hf(run.config, run.checkpoint, str(adapter))
    with pytest.raises(CheckpointError, match='does not fit') as caught:
        load_answerer(base, adapter=str(adapter))
    told = str(caught.value)
    assert str(adapter) in told
    assert base in told or (run.base in told and other in told)
    assert '\n' not in told
    assert len(told.replace(str(tmp_path.parent), '')) < 600  # PEFT names every module
    assert 'tmp/tmp' not in told  # the folder in which both lay for a moment
