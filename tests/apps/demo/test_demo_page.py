"""What happens on the page of the demo, without a browser: questions, pictures, stopping, mistakes."""

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.apps.demo.parrots import Endless, Parrot
from vlmtune.apps.demo.examples import read_example_folder
from vlmtune.apps.demo.page import DemoPage
from vlmtune.apps.demo.settings import gr
from vlmtune.apps.demo.turns import NO_ANSWER, Turn, to_conversation, to_messages
from vlmtune.utils.errors import DataError

SETTINGS = (16, 0, 1, 0, 1, -1)  # tokens, temperature, top-p, top-k, penalty, seed


def browser(name='a'):
    return SimpleNamespace(session_hash=name)


def ask(page, text, turns=(), files=(), session='a', settings=SETTINGS, system=''):
    """A question and all that is shown while it is answered: the turns, and the windows at every moment."""
    _, turns, *windows = page.take(browser(session), dict(text=text, files=list(files)), turns)
    moments = [windows]
    for new, *windows in page.answer(browser(session), turns, system, *settings):
        moments.append(windows)
        turns = new if isinstance(new, tuple) else turns
    return turns, moments


@pytest.fixture
def picture(tmp_path):
    Image.new('RGB', (60, 40), 'red').save(tmp_path / 'red.png')
    return str(tmp_path / 'red.png')


# ---- what a voice is told, and what its window shows


def said(window):
    """The texts that a window shows."""
    return [message['content']['text'] for message in window if 'text' in message['content']]


def test_a_voice_knows_its_own_answers_and_all_pictures():
    turns = (Turn('first', ('1.png',), ('x', 'y')), Turn('second', ('2.png', '3.png'), ('z',)))
    conversation = to_conversation(turns[:1] + (Turn('second', ('2.png', '3.png')),), voice=1, system='Be brief.')
    assert [message.role for message in conversation.messages] == ['system', 'user', 'assistant', 'user']
    assert [message.text for message in conversation.messages] == ['Be brief.', 'first', 'y', 'second']
    assert list(conversation.shown_images()) == [0, 1, 2]
    assert [image.path for image in conversation.images] == ['1.png', '2.png', '3.png']
    assert said(to_messages(turns, voice=0)) == ['first', 'x', 'second', 'z']
    assert said(to_messages(turns, voice=1, saying='<w>')) == ['first', 'y', 'second', '&lt;w&gt;']
    assert [message['content']['path'] for message in to_messages(turns, voice=1) if 'path' in message['content']] == [
        '1.png',
        '2.png',
        '3.png',
    ]


def test_a_turn_without_an_answer_is_shown_but_not_told():
    turns = (Turn('first', ('1.png',), ('',)), Turn('second', ('2.png',)))
    conversation = to_conversation(turns, voice=0)
    assert [message.text for message in conversation.messages] == ['second']
    assert ([image.path for image in conversation.images], list(conversation.shown_images())) == (['2.png'], [0])
    assert said(to_messages(turns, voice=0)) == ['first', NO_ANSWER, 'second']


# ---- what happens on the page


@pytest.fixture
def page_of():
    """``page_of(voice, ...)``; the page is built, as ``vlmtune demo`` does it."""

    def build(*voices, examples=None):
        page = DemoPage(voices, examples or SimpleNamespace(pictures=(), prompts=()))
        page.build(system='', max_new_tokens=16)
        return page

    return build


def test_several_turns_with_a_second_picture_and_two_voices(page_of, picture):
    voices = Parrot(('old',)), Parrot(('new ', 'words'))
    page = page_of(*voices)
    turns, moments = ask(page, 'What is it?', files=[picture])
    assert [len(window) for window in moments[0]] == [3, 3]  # the picture, the question, and that one thinks
    assert [said(window)[-1] for window in moments[-1]] == ['old', 'new words']
    turns, moments = ask(page, 'And this?', turns, files=[picture], system='Be brief.')
    first, second = (voice.asked[-1][0] for voice in voices)
    assert [message.text for message in first.messages] == ['Be brief.', 'What is it?', 'old', 'And this?']
    assert [message.text for message in second.messages] == ['Be brief.', 'What is it?', 'new words', 'And this?']
    assert len(second.images) == 2
    assert [len(window) for window in moments[-1]] == [6, 6]


def test_settings_reach_the_model(page_of):
    voice = Parrot()
    ask(page_of(voice), 'why?', settings=(7, 0.5, 0.9, 3, 1.2, 42))
    _, settings, seed = voice.asked[0]
    assert seed == 42
    assert settings == dict(
        max_new_tokens=7, do_sample=True, temperature=0.5, top_p=0.9, top_k=3, repetition_penalty=1.2
    )
    ask(page_of(voice), 'why?', settings=(7, 0, 0.9, 3, 1, -1))  # limits of sampling do nothing without a temperature
    assert voice.asked[1][1]['do_sample'] is False
    assert voice.asked[1][2] is None


def test_the_stop_button_leaves_what_was_said(page_of):
    page = page_of(Endless())
    _, turns, _ = page.take(browser(), dict(text='why?', files=[]), ())
    answer = page.answer(browser(), turns, '', *SETTINGS)
    next(answer)
    with pytest.warns(UserWarning, match='an answer is being written; stop it first'):
        assert page.take(browser(), dict(text='more', files=[]), turns) == [gr.skip()] * 3
    page.stop(browser('another'))  # somebody else's button
    next(answer)
    page.stop(browser())
    *_, (turns, window) = answer
    assert turns == (Turn('why?', (), ('word',)),)
    assert said(window) == ['why?', 'word']
    page.take(browser(), dict(text='more', files=[]), turns)


def test_a_browser_that_leaves_stops_its_answer(page_of):
    voice = Endless()
    page = page_of(voice)
    _, turns, _ = page.take(browser(), dict(text='why?', files=[]), ())
    answer = page.answer(browser(), turns, '', *SETTINGS)
    next(answer)
    page.leave(browser())
    assert voice.stopped.wait(60)
    nothing = (gr.skip(), gr.skip())
    assert list(answer) == [(gr.skip(), [])]
    assert list(page.answer(browser(), turns, '', *SETTINGS)) == [nothing]  # one that was still waiting
    _, turns, _ = page.take(browser(), dict(text='back again', files=[]), turns)
    assert [turn.text for turn in turns] == ['back again']


@pytest.mark.parametrize('asked_again', [False, True])
def test_an_answer_that_ends_behind_a_new_chat_is_not_shown(page_of, asked_again):
    page = page_of(Parrot())
    _, turns, _ = page.take(browser(), dict(text='why?', files=[]), ())
    answer = page.answer(browser(), turns, '', *SETTINGS)
    assert any(said(window)[-1] == 'one two three' for _, window in answer)  # all that it says; its end is to come
    page.clear(browser())
    if asked_again:
        page.take(browser(), dict(text='and now?', files=[]), ())
    assert list(answer) == [(gr.skip(), gr.skip() if asked_again else [])]


def test_a_new_chat_forgets(page_of):
    page = page_of(Parrot())
    ask(page, 'why?')
    _, turns, window = page.clear(browser())
    assert (turns, window) == ((), [])


@pytest.mark.parametrize(
    ('error', 'told'),
    [
        (DataError('image <b>gone</b>'), 'image &lt;b&gt;gone&lt;/b&gt;'),
        (torch.OutOfMemoryError('CUDA'), 'out of memory; begin a new chat, or show a smaller picture'),
        (RuntimeError('odd'), 'the answer failed: RuntimeError: odd'),
    ],
)
def test_a_failed_answer_is_told_and_its_question_forgotten(page_of, error, told):
    voice = Parrot()
    page = page_of(voice)
    turns, _ = ask(page, 'first')
    voice.fails = error
    _, pending, _ = page.take(browser(), dict(text='second', files=[]), turns)
    answer = page.answer(browser(), pending, '', *SETTINGS)
    with pytest.warns(UserWarning, match=f'^{re.escape(told)}$'):
        assert next(answer)[0] == turns
    assert list(answer) == []
    voice.fails = None
    turns, _ = ask(page, 'third', turns)
    assert [turn.text for turn in turns] == ['first', 'third']


def test_what_is_no_picture_is_refused_by_its_own_name(page_of, tmp_path):
    page = page_of(Parrot())
    (tmp_path / 'notes<i>.png').write_text('no picture')
    (tmp_path / 'drawing.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    for name, shown in (('notes<i>.png', 'notes&lt;i&gt;.png'), ('drawing.svg', 'drawing.svg')):
        with pytest.warns(UserWarning, match=f'^not an image file: {shown}; expected JPEG'):
            page.take(browser(), dict(text='what?', files=[str(tmp_path / name)]), ())
    with pytest.warns(UserWarning, match='this is a text model; it takes no pictures'):
        page_of(Parrot(takes_images=False)).take(browser(), dict(text='what?', files=['any.png']), ())
    with pytest.warns(UserWarning, match='the text is not UTF-8 from its character 2 on'):
        page.take(browser(), dict(text='a\ud800', files=[]), ())
    with pytest.warns(UserWarning, match='write a question, too'):
        page.take(browser(), dict(text=' ', files=[]), ())


def test_a_picture_of_the_gallery_goes_into_the_message(page_of, tmp_path, picture):
    (tmp_path / 'red.txt').write_text('What colour is it?')
    page = page_of(Parrot(), examples=read_example_folder(tmp_path))
    message, _ = page.pick(SimpleNamespace(index=0), dict(text='', files=['mine.png']))
    assert message['text'] == 'What colour is it?'
    assert message['files'][0] == 'mine.png'
    assert message['files'][1].endswith('red.png')
    assert page.pick(SimpleNamespace(index=0), dict(text='Mine?', files=[]))[0]['text'] == 'Mine?'
