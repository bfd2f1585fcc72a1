"""Answers with settings of their own, stopped early, of a base without its adapter; weights out of memory."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from vlmtune.apps.chat.answering import Answerer, generation_settings, load_answerer
from vlmtune.apps.chat.pieces import PieceStreamer
from vlmtune.data import Processor
from vlmtune.evaluation import generate
from vlmtune.models import load_model
from vlmtune.structures import Conversation, Message, TextPart
from vlmtune.utils.errors import ConfigError, DataError

GREEDY = dict(temperature=0.0, top_p=None, top_k=None)


def ask(text):
    return Conversation((Message('user', (TextPart(text),)),))


@pytest.fixture(scope='module')
def talker(tiny_model):
    """A model that says many words."""
    path = str(tiny_model('llama', amplify=4.0))
    model, _ = load_model(path, dtype=torch.float32)
    return Answerer(model, Processor(path), settings=dict(max_new_tokens=40, do_sample=False))


# ---- settings and stops of one answer


def test_settings_of_one_answer_go_over_those_of_all(talker):
    whole = talker.answer(ask('long'))
    short = talker.answer(ask('long'), settings=dict(max_new_tokens=3))
    assert whole.startswith(short)
    assert len(short) < len(whole)
    sampling = Answerer(
        talker.model, talker.processor, settings=dict(do_sample=True, temperature=9.0, top_k=0, max_new_tokens=40)
    )
    torch.manual_seed(0)
    assert sampling.answer(ask('long')) != whole
    assert sampling.answer(ask('long'), settings=dict(do_sample=False)) == whole


def test_repetition_penalty_and_stop_words_are_settings(talker):
    plain = generation_settings(max_new_tokens=40, **GREEDY)
    punished = generation_settings(max_new_tokens=40, repetition_penalty=5.0, **GREEDY)
    assert punished == plain | dict(repetition_penalty=5.0)
    assert talker.answer(ask('long'), settings=punished) != talker.answer(ask('long'), settings=plain)
    stopped = generation_settings(max_new_tokens=40, stop_words=['a', 'b'], repetition_penalty=1.0, **GREEDY)
    assert stopped == plain | dict(stop_strings=['a', 'b'])
    assert generation_settings(max_new_tokens=40, stop_words='###', **GREEDY)['stop_strings'] == ['###']
    for wrong, told in (
        (dict(repetition_penalty=-1.0), '--repetition-penalty -1.0: expected a number above 0'),
        (dict(temperature=float('inf')), '--temperature inf: expected a number above 0'),
        (dict(max_new_tokens=0), '--max-new-tokens 0: expected a positive integer'),
        (dict(stop_words=['a', '']), "--stop-words holds ''; expected texts of at least one character"),
    ):
        with pytest.raises(ConfigError, match=told):
            generation_settings(**dict(max_new_tokens=40, **GREEDY) | wrong)


def test_a_stop_string_is_neither_answered_nor_shown_on_the_way(talker):
    whole = talker.answer(ask('long'))
    for stop in (whole[8:11], whole[8:9], whole[-4:]):
        pieces = []
        answer = talker.answer(ask('long'), pieces.append, settings=dict(stop_strings=[stop]))
        assert answer == whole.partition(stop)[0].strip()
        assert ''.join(pieces).strip() == answer


def test_what_may_begin_a_stop_string_waits(talker):
    pieces = []
    streamer = PieceStreamer(talker.processor.tokenizer, pieces.append, stop_strings=['STOP now'])
    for text in (' one ', 'ST', 'AR STOP', ' ', 'later ', 'STOP'):
        streamer.pass_on(text)
    assert pieces == ['one ', 'STAR ', 'STOP later ']
    streamer.end()
    assert streamer.text == ''.join(pieces) == 'one STAR STOP later STOP'


@pytest.mark.parametrize('family', ['llama', 'internlm2', 'qwen2', 'gemma3'])
def test_pieces_are_passed_on_as_they_come_in_any_script(tiny_model, family):
    tokenizer = Processor(str(tiny_model(family))).tokenizer
    text = 'one two. ภาษาไทย 日本語です🙂 end'
    tokens = tokenizer(f' {text}', add_special_tokens=False)['input_ids']
    pieces = []
    streamer = PieceStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokens:
        streamer.put(torch.tensor([token]))
    shown = ''.join(pieces)
    streamer.end()
    assert streamer.text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert shown == streamer.text
    assert len(pieces) > 15
    assert not any('\ufffd' in piece for piece in pieces)


def test_spaces_between_words_stay_where_a_tokenizer_takes_the_first_one_off():
    words = Tokenizer(WordLevel({'\u2581one': 0, '\u2581two': 1, 's': 2}, unk_token='s'))
    words.decoder = Metaspace()
    pieces = []
    streamer = PieceStreamer(PreTrainedTokenizerFast(tokenizer_object=words), pieces.append)
    streamer.put(torch.tensor([[0]]))  # the prompt
    for token in (0, 1, 2, 0):
        streamer.put(torch.tensor([token]))
    assert pieces == ['one', ' two', 's', ' one']


def test_whoever_asks_ends_the_answer(talker):
    left = iter([False] * 5 + [True])
    stopped = talker.answer(ask('long'), should_stop=lambda: next(left))
    assert stopped == talker.answer(ask('long'), settings=dict(max_new_tokens=6))


def test_a_conversation_may_not_be_longer_than_the_model_takes(talker):
    most = talker.model.config.max_position_embeddings
    length = lambda text: len(talker.processor.tokenize(ask(text), add_generation_prompt=True))  # noqa: E731
    fits = 'a' * (most - 3 - length(''))
    assert length(fits) == most - 3
    answer = talker.answer(ask(fits))
    assert answer == talker.answer(ask(fits), settings=dict(max_new_tokens=3))
    assert answer == generate(talker.model, talker.processor, [ask(fits)], max_new_tokens=3)[0]
    with pytest.raises(DataError, match=rf'has {most} tokens.* takes {most}; begin a new one \(/clear\)'):
        talker.answer(ask(fits + 'aaa'))


# ---- templates of bare language models


@pytest.fixture(scope='module')
def bare(tiny_model, tmp_path_factory):
    """A language model without a chat template."""
    path = tmp_path_factory.mktemp('bare')
    for file in tiny_model('llama', amplify=4.0).iterdir():
        if file.name != 'chat_template.jinja':
            (path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((path / 'tokenizer_config.json').read_text(encoding='utf-8'))
    settings.pop('chat_template', None)
    (path / 'tokenizer_config.json').write_text(json.dumps(settings), encoding='utf-8')
    return str(path)


def test_a_model_without_a_chat_template_asks_for_one_before_it_is_loaded(bare, tmp_path, monkeypatch):
    monkeypatch.setattr('vlmtune.apps.chat.answering.load_model', lambda *_, **__: pytest.fail('loaded'))
    with pytest.raises(ConfigError, match=r'has no chat template; set prompt_template \(--prompt-template\) to one of'):
        load_answerer(bare)
    with pytest.raises(ConfigError, match="'chatlm' does not exist, did you mean 'chatml'"):
        load_answerer(bare, prompt_template='chatlm')
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    (tmp_path / 'adapter_model.safetensors').touch()
    with pytest.raises(ConfigError, match=f'^{bare} has no chat template'):
        load_answerer(bare, adapter=str(tmp_path))


def test_a_named_template_ends_answers_also_where_the_tokenizer_does_not_know_its_tokens(bare):
    answerer = load_answerer(bare, prompt_template='chatml')
    assert answerer.settings == dict(stop_strings=['<|im_end|>'])
    answerer = load_answerer(bare, prompt_template='vicuna', settings=dict(stop_strings=['x']))
    assert answerer.settings == dict(stop_strings=['x'])  # it closes with a token that every tokenizer has
    rendered = answerer.processor.renderer.render(ask('Why?'), add_generation_prompt=True).text
    assert rendered.endswith('USER: Why? ASSISTANT:')


# ---- weights that do not fit


def test_weights_that_do_not_fit_lie_in_files(tiny_model, tmp_path, monkeypatch):
    path = str(tiny_model('llama', amplify=4.0))
    monkeypatch.setattr('transformers.integrations.accelerate.accelerate_max_memory', lambda _: {'cpu': 400_000})
    answerer = load_answerer(path, offload_folder=str(tmp_path / 'offload'), settings=dict(max_new_tokens=8))
    assert 'disk' in answerer.model.hf_device_map.values()
    whole, processor = load_model(path, dtype=torch.float32)[0], Processor(path)
    assert answerer.answer(ask('long')) == generate(whole, processor, [ask('long')], max_new_tokens=8)[0]


def test_an_adapter_is_merged_before_it_is_offloaded(tmp_path):
    with pytest.raises(ConfigError, match=r'merge it first \(vlmtune convert merge base a OUT\)'):
        load_answerer('base', adapter='a', offload_folder=str(tmp_path))
