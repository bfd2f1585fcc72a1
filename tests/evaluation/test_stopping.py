"""What ends an answer early."""

import pytest
import torch

from vlmtune.data import Processor
from vlmtune.evaluation import generate
from vlmtune.evaluation.stopping import cut_at, stopping_criteria
from vlmtune.models import load_model
from vlmtune.structures import Conversation, Message, TextPart
from vlmtune.utils.errors import ConfigError


def ask(text):
    return Conversation((Message('user', (TextPart(text),)),))


@pytest.fixture(scope='module')
def talker(tiny_model):
    """A model that says many words."""
    path = str(tiny_model('llama', amplify=4.0))
    return load_model(path, dtype=torch.float32)[0], Processor(path)


def test_an_answer_ends_before_a_stop_string_and_others_of_the_batch_go_on(talker):
    questions = [ask('one'), ask('a longer question'), ask('three')]
    whole = generate(*talker, questions, max_new_tokens=24, batch_size=3)
    stop = whole[0][5:8]
    assert len(stop) == 3
    assert min(map(len, whole)) > 12
    cut = generate(*talker, questions, max_new_tokens=24, batch_size=3, stop_strings=[stop, '\ue123'])
    assert cut == [answer.partition(stop)[0].strip() for answer in whole]
    assert cut[0] != whole[0]
    assert any(answer == again for answer, again in zip(whole, cut, strict=True))


def test_no_token_is_made_after_a_stop_string(talker):
    whole = generate(*talker, [ask('one')], max_new_tokens=24)[0]
    steps = []
    with_steps = lambda: bool(steps.append(1))  # noqa: E731
    generate(*talker, [ask('one')], max_new_tokens=24, stop_strings=whole[5:8], should_stop=with_steps)
    assert len(steps) < 12


def test_whoever_asks_ends_all_answers(talker):
    left = iter([False, False, True])
    answers = generate(
        *talker, [ask('one'), ask('two')], max_new_tokens=24, batch_size=2, should_stop=lambda: next(left)
    )
    whole = generate(*talker, [ask('one'), ask('two')], max_new_tokens=3, batch_size=2)
    assert answers == whole


@pytest.mark.parametrize('text', ['end.', '结束', '<|im_end|>', '\n\n'])
def test_a_stop_string_of_any_script_is_found_in_the_answer_and_not_in_the_prompt(talker, text):
    tokenizer = talker[1].tokenizer
    ids = tokenizer(f'so {text}', add_special_tokens=False, return_tensors='pt')['input_ids']
    length = ids.shape[1]
    assert stopping_criteria(tokenizer, prompt_length=0, stop_strings=[text])(ids, None).tolist() == [True]
    assert stopping_criteria(tokenizer, prompt_length=length, stop_strings=[text])(
        torch.cat([ids, ids[:, :1]], 1), None
    ).tolist() == [False]
    for prompt in range(1, length):  # a stop string may not begin in the prompt
        inside = tokenizer.decode(ids[0, prompt:])
        found = stopping_criteria(tokenizer, prompt_length=prompt, stop_strings=[text])(ids, None).tolist()
        assert found == [text in inside]


def test_cut_at_the_first_of_them():
    assert cut_at('one two three', ['three', 'two']) == 'one '
    assert cut_at('one two', 'e t') == 'on'
    assert cut_at('one', ['x']) == 'one'
    assert cut_at('one', ()) == 'one'


@pytest.mark.parametrize('wrong', [[''], ['a', 3]])
def test_a_stop_string_must_be_a_text(talker, wrong):
    with pytest.raises(ConfigError, match='stop_strings holds'):
        generate(*talker, [ask('one')], max_new_tokens=1, stop_strings=wrong)
