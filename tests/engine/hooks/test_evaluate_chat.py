"""Sample answers are recorded, and training does not notice."""

import json
from pathlib import Path

import pytest

from vlmtune.engine import EvaluateChatHook
from vlmtune.structures import ImagePart, TextPart
from vlmtune.utils.errors import ConfigError

SHORT = dict(max_steps=4, max_epochs=None)


@pytest.fixture
def questions(tiny_data):
    picture = str(tiny_data('llava', rows=17).image_folder / '000.png')
    return dict(questions=['What colour is the square?', 'Hello?'], pictures=[picture, None])


@pytest.mark.parametrize('generation', [{}, dict(do_sample=True, top_k=5)], ids=['greedy', 'sampled'])
@pytest.mark.parametrize('pack', [True, False], ids=['packed', 'padded'])
def test_training_is_bit_equal_with_and_without_questions(pack, generation, questions, run, contents, differences):
    settings = dict(SHORT, pack_to_max_length=pack)
    plain = contents(run('plain', **settings) / 'iter_4.pth')
    recipe = dict(questions, generation=generation)
    asked = contents(run('asked', recipe=recipe, evaluation_freq=1, **settings) / 'iter_4.pth')
    assert differences(asked, plain) == []


def test_answers_are_written_before_while_and_after(questions, run, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        work_dir = run('asked', recipe=questions, evaluation_freq=2, **SHORT)
    rows = [json.loads(line) for line in (work_dir / 'evaluate_chat.jsonl').read_text().splitlines()]
    assert [row['iteration'] for row in rows] == [0, 0, 2, 2, 4, 4]
    assert rows[0].keys() == {'iteration', 'input', 'images', 'answer'}
    assert [row['input'] for row in rows[:2]] == questions['questions']
    assert [row['images'] for row in rows[:2]] == [[questions['pictures'][0]], []]
    assert all(isinstance(row['answer'], str) for row in rows)
    assert 'sample answer at iteration 2' in caplog.text
    assert 'asked: Hello?' in caplog.text


def test_without_an_interval_it_asks_before_and_after_only(questions, run):
    work_dir = run('asked', recipe=questions, **SHORT)
    rows = [json.loads(line) for line in (work_dir / 'evaluate_chat.jsonl').read_text().splitlines()]
    assert [row['iteration'] for row in rows] == [0, 0, 4, 4]


def test_without_questions_nothing_is_written(run):
    assert not (run('plain', **SHORT) / 'evaluate_chat.jsonl').exists()


def test_a_picture_that_is_not_there(questions, run):
    with pytest.raises(ConfigError, match=r'evaluation_images\[0\]: no file at /gone.png'):
        run('asked', recipe={**questions, 'pictures': ['/gone.png', None]}, **SHORT)


def test_a_picture_that_breaks_off_is_told_before_training(questions, tmp_path):
    whole = Path(questions['pictures'][0]).read_bytes()
    (tmp_path / 'half.png').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r'evaluation_images\[1\]: .*half.png'):
        EvaluateChatHook(['a', 'b'], images=[None, str(tmp_path / 'half.png')])


def test_pictures_per_question(questions):
    x = questions['pictures'][0]
    hook = EvaluateChatHook(['a', 'b', 'c'], images=[x, [x, x], None], system='Be brief.')
    assert [[str(i) for i in c.images] for c in hook.conversations] == [[x], [x, x], []]
    assert [m.role for m in hook.conversations[0].messages] == ['system', 'user']
    assert hook.conversations[1].messages[1].parts == (ImagePart(0), ImagePart(1), TextPart('b'))


def test_one_picture_goes_with_every_question_and_one_question_may_be_a_word(questions):
    picture = questions['pictures'][0]
    assert [len(c.images) for c in EvaluateChatHook(['a', 'b'], images=picture).conversations] == [1, 1]
    assert EvaluateChatHook('What?').inputs == ['What?']


def test_pictures_and_questions_that_differ_in_number():
    with pytest.raises(ConfigError, match='evaluation_images has 1 entries, evaluation_inputs 2; give one each'):
        EvaluateChatHook(['a', 'b'], images=['x.png'])


def test_a_system_message_per_question():
    hook = EvaluateChatHook(['a', 'b'], system=['Be brief.', None])
    assert [[m.role for m in c.messages] for c in hook.conversations] == [['system', 'user'], ['user']]
    assert hook.conversations[0].messages[0].text == 'Be brief.'
    with pytest.raises(ConfigError, match='SYSTEM has 1 entries, evaluation_inputs 2; give one each'):
        EvaluateChatHook(['a', 'b'], system=['Be brief.'])


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(generation=dict(top_q=0.9)), "EvaluateChatHook.generation: .*no setting 'top_q', did you mean 'top_"),
        (dict(max_new_tokens=0), 'max_new_tokens=0; expected a positive integer'),
        (dict(stop_words=['']), "EvaluateChatHook.stop_words holds ''; expected texts of at least one character"),
    ],
)
def test_settings_that_cannot_be_are_told_before_training(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateChatHook(['a'], **settings)


def test_an_answer_ends_before_a_stop_word(questions, run):
    asked = dict(questions=questions['questions'][1:], pictures=[None])
    last = 'custom_hooks.1.'
    free = answers(run('free', recipe=asked, **{**SHORT, 'max_steps': 1, f'{last}max_new_tokens': 8}))
    word = free[0][len(free[0]) // 2 :][:3]
    assert word.strip()
    stopped = answers(
        run(
            'stopped',
            recipe=asked,
            **{**SHORT, 'max_steps': 1, f'{last}max_new_tokens': 8, f'{last}stop_words': [word]},
        )
    )
    assert stopped[0] == free[0].partition(word)[0].strip()


def answers(work_dir):
    return [json.loads(line)['answer'] for line in (work_dir / 'evaluate_chat.jsonl').read_text().splitlines()]
