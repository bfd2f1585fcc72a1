"""Who answers in the demo: models side by side, on one set of weights where that will do, and one after the other."""

import queue
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.apps.demo.parrots import Endless, Parrot
from vlmtune.apps.demo.turns import Turn, to_conversation
from vlmtune.apps.demo.voices import Speaking, load_voices
from vlmtune.cli import main
from vlmtune.utils.errors import ConfigError, ModelError


def test_before_is_after_with_its_adapter_off_and_another_adapter_beside_shares_its_base(trained_run, tmp_path):
    run = trained_run('llava', llm='lora', projector='full')
    adapter = str(tmp_path / 'adapter')
    assert main(['convert', 'pth_to_hf', run.config, run.checkpoint, adapter]) == 0
    base = load_voices(run.base)[0].answerer.model
    before, after = load_voices(run.base, adapter=adapter, compare=run.base)
    assert (before.name, after.name) == (f'before: {run.base}', f'after: {run.base} + {adapter}')
    assert before.answerer.model is after.answerer.model
    trained, plain = run.logits(after.answerer.model), run.logits(base)
    assert not torch.allclose(trained, plain, atol=1e-2)
    with before.answerer.adapted.disable_adapter():
        assert torch.equal(run.logits(before.answerer.model), plain)
    assert torch.equal(run.logits(after.answerer.model), trained)
    for compare in (run.base, ''):
        by_folder = load_voices(adapter, compare=compare)
        assert by_folder[0].answerer.model is by_folder[1].answerer.model
        assert by_folder[0].name == f'before: {run.base}'
    other = shutil.copytree(adapter, tmp_path / 'other')
    weights = load_file(other / 'adapter_model.safetensors')
    save_file({name: weight * 2 for name, weight in weights.items()}, other / 'adapter_model.safetensors')
    del before, after, by_folder
    first, second = load_voices(adapter, compare=str(other))
    assert (first.name, second.name) == (str(other), adapter)
    assert torch.equal(run.logits(second.answerer.model), trained)
    assert not torch.allclose(run.logits(first.answerer.model), trained, atol=1e-2)
    models = [dict(voice.answerer.model.named_parameters()) for voice in (first, second)]
    shared = {name for name, weight in models[0].items() if weight.data_ptr() == models[1][name].data_ptr()}
    own = set(models[0]) - shared
    assert len(own) == len(weights)
    assert all('lora' in name or 'projector' in name for name in own)


def test_tokens_that_the_adapter_added_are_not_said_before(trained_run, tmp_path):
    run = trained_run(
        'llava', llm='lora', projector='full', special_tokens=('<new>',), embeddings='full', lm_head='full'
    )
    adapter = str(tmp_path / 'adapter')
    assert main(['convert', 'pth_to_hf', run.config, run.checkpoint, adapter]) == 0
    before, after = load_voices(run.base, adapter=adapter, compare=run.base)
    rows = after.answerer.model.get_input_embeddings().weight.shape[0]
    have = before.answerer.processor.config.get_text_config().vocab_size
    assert rows > have
    assert before.answerer.settings['suppress_tokens'] == list(range(have, rows))
    assert 'suppress_tokens' not in after.answerer.settings


def test_another_model_is_loaded_beside(tiny_model):
    before, after = load_voices(str(tiny_model('llava', amplify=2.0)), compare=str(tiny_model('llava')))
    assert before.answerer.model is not after.answerer.model


def test_a_comparison_that_is_nowhere_is_told_before_anything_is_loaded(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr('vlmtune.apps.demo.voices.load_answerer', lambda *_, **__: pytest.fail('loaded'))
    with pytest.raises(ModelError, match='nowhere'):
        load_voices(str(tiny_model('llava')), compare=str(tmp_path / 'nowhere'))


def test_there_is_nothing_to_compare_without_an_adapter(tiny_model):
    with pytest.raises(ConfigError, match='--compare alone: .* has no adapter to switch off; name the model'):
        load_voices(str(tiny_model('llava')), compare='')


def test_a_seed_repeats_a_sampled_answer(tiny_model):
    (voice,) = load_voices(str(tiny_model('llava')))
    settings = dict(do_sample=True, temperature=2.0, max_new_tokens=12)
    options = dict(settings=settings, should_stop=lambda: False)
    conversation = to_conversation([Turn('why?')], voice=0)
    first, other, again = (voice.answer(conversation, lambda _: None, seed=seed, **options) for seed in (1, 2, 1))
    assert first == again != other


def test_a_text_model_takes_no_pictures(tiny_model):
    (text,), (vision,) = (load_voices(str(tiny_model(name))) for name in ('llama', 'llava'))
    assert (text.takes_images, vision.takes_images) == (False, True)


# ---- an answer on its way


def test_an_answer_comes_in_pieces_and_ends_whole():
    stream = Speaking().stream(Parrot(), None, settings={}, seed=None, stop=threading.Event())
    said = list(stream)
    assert said[-1] == 'one two three'
    assert all('one two three'.startswith(earlier.strip()) for earlier in said)


def test_whoever_drops_an_answer_stops_it():
    voice = Endless()
    stream = Speaking().stream(voice, None, settings={}, seed=None, stop=threading.Event())
    assert next(stream) == 'word '
    stream.close()
    assert voice.stopped.wait(60)


def test_answers_wait_for_each_other():
    speaking, stop, order = Speaking(), threading.Event(), queue.SimpleQueue()
    endless, parrot = Endless(), Parrot()
    first = speaking.stream(endless, None, settings={}, seed=None, stop=stop)
    next(first)
    other = threading.Thread(
        target=lambda: order.put(
            list(speaking.stream(parrot, None, settings={}, seed=None, stop=threading.Event()))[-1]
        )
    )
    other.start()
    assert parrot.asked == []
    stop.set()
    assert list(first)[-1] == 'word'
    assert order.get(timeout=60) == 'one two three'
