"""One question, or a conversation: what is asked reaches the model, mistakes and Ctrl-C do not end it."""

import io
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from vlmtune.apps.chat import chat
from vlmtune.apps.chat.answering import Answerer, generation_settings, load_answerer
from vlmtune.apps.chat.session import ChatSession
from vlmtune.apps.chat.terminal import Terminal
from vlmtune.data import Processor
from vlmtune.evaluation import generate
from vlmtune.models import load_model
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.errors import CheckpointError, ConfigError, DataError, ModelError

WORDS = 'What colour is the square?'


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('image') / 'a square.png'
    Image.new('RGB', (60, 40), 'red').save(path)
    return str(path)


@pytest.fixture(scope='module')
def llava(tiny_model):
    return str(tiny_model('llava', amplify=4.0))


def ask(text, *images):
    parts = [ImagePart(i) for i in range(len(images))]
    return Conversation((Message('user', (*parts, TextPart(text))),), tuple(ImageRef(path=i) for i in images))


def expected(path, conversation, **settings):
    model, _ = load_model(path, dtype=torch.float32)
    return generate(model, Processor(path), [conversation], **{'max_new_tokens': 8, **settings})[0]


# ---- one question


def test_one_question_gives_its_answer_and_nothing_else(llava, image, capsys):
    chat(llava, images=[image], prompt=WORDS, max_new_tokens=8)
    answer = expected(llava, ask(WORDS, image))
    assert answer
    assert capsys.readouterr().out.strip() == answer
    chat(llava, prompt=WORDS, max_new_tokens=8)
    assert capsys.readouterr().out.strip() != answer  # the image was seen


def test_system_message_and_seed_count(llava, capsys):
    def answers(**settings):
        chat(llava, prompt=WORDS, max_new_tokens=8, **settings)
        return capsys.readouterr().out

    greedy = answers()
    assert answers(system='Be brief.') != greedy
    sampled = [answers(temperature=5.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(('bits', 'kind'), [(4, 'Linear4bit'), (8, 'Linear8bitLt')])
def test_bits_quantise_the_language_model_only(llava, bits, kind):
    names = [
        name for name, module in load_answerer(llava, bits=bits).model.named_modules() if type(module).__name__ == kind
    ]
    assert len(names) == 2 * 7
    assert all(name.startswith('model.language_model.layers.') for name in names)


def test_bad_input_is_told_in_one_line(llava, tiny_model, image, tmp_path):
    llama = str(tiny_model('llama'))
    cases = [
        (dict(model=str(tmp_path / 'none')), ModelError, 'no model at'),
        (dict(model=llava, adapter=str(tmp_path / 'none')), CheckpointError, 'no adapter at'),
        (dict(model=llava, images=[str(tmp_path / 'none.png')]), DataError, 'no image file at'),
        (dict(model=llama, images=[image]), DataError, 'text model'),
        (dict(model=llava, bits=3), ConfigError, 'expected 4 or 8'),
        (dict(model=llava, temperature=-1.0), ConfigError, '--temperature'),
        (dict(model=llava, temperature=float('inf')), ConfigError, '--temperature'),
        (dict(model=llava, repetition_penalty=0), ConfigError, '--repetition-penalty 0: expected a number above 0'),
        (dict(model=llava, system='half \udcff'), DataError, 'the text is not UTF-8 from its character 6 on'),
        (dict(model=llava, prompt='\udcff'), DataError, 'the text is not UTF-8 from its character 1 on'),
    ]
    for settings, error, match in cases:
        with pytest.raises(error, match=match) as caught:
            chat(**dict(prompt=WORDS) | settings)
        assert '\n' not in str(caught.value)


def test_settings_of_generate():
    greedy = dict(max_new_tokens=8, temperature=0.0, top_p=None, top_k=None)
    assert generation_settings(**greedy) == dict(max_new_tokens=8, do_sample=False)
    assert generation_settings(**greedy | dict(temperature=None, top_p=1.0, top_k=0))['do_sample'] is False
    sampled = generation_settings(**greedy | dict(temperature=0.7, top_k=5))
    assert sampled == dict(max_new_tokens=8, do_sample=True, temperature=0.7, top_p=1.0, top_k=5)
    for wrong in (dict(top_p=0.9), dict(top_k=5), dict(temperature=1.0, top_p=0.0), dict(temperature=1.0, top_k=-1)):
        with pytest.raises(ConfigError, match='--top'):
            generation_settings(**greedy | wrong)


# ---- a conversation


@pytest.fixture(scope='module')
def answerer(llava):
    model, _ = load_model(llava, dtype=torch.float32)
    return Answerer(model, Processor(llava), settings=dict(max_new_tokens=4, do_sample=False))


class Recorder(Answerer):
    """Notes what it was asked."""

    def answer(self, conversation, write):
        asked.append(conversation)
        return super().answer(conversation, write)


asked: list[Conversation] = []


def talk(answerer, lines, monkeypatch, capsys, **session):
    """Run a terminal on these lines; returns the conversations that were asked, standard output, standard error."""
    asked.clear()
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''.join(f'{line}\n' for line in lines)))
    recorder = Recorder(answerer.model, answerer.processor, settings=answerer.settings)
    Terminal(ChatSession(**session), recorder).run()
    captured = capsys.readouterr()
    return list(asked), captured.out, captured.err


def test_history_and_images_of_any_turn_reach_the_model(answerer, image, monkeypatch, capsys):
    lines = ['Hello?', f'/image {image}', WORDS, '', 'And now?']
    conversations, out, err = talk(answerer, lines, monkeypatch, capsys, system='Be brief.')
    assert [len(conversation.messages) for conversation in conversations] == [2, 4, 6]
    assert [len(conversation.images) for conversation in conversations] == [0, 1, 1]
    assert conversations[2].messages[3].image_indices == (0,)
    answers = [message.text for message in conversations[2].messages if message.role == 'assistant']
    assert '60 x 40 pixels' in err
    assert out.split('\n')[:2] == answers
    alone = generate(answerer.model, answerer.processor, conversations, max_new_tokens=4)
    assert out.split('\n') == [*alone, '']


def test_mistakes_do_not_end_a_chat(answerer, monkeypatch, capsys):
    lines = ['/image nowhere.png', '/image', '/imagine', 'half \udcff', 'Hello?', '/exit', 'never asked']
    conversations, _, err = talk(answerer, lines, monkeypatch, capsys)
    assert [conversation.messages[-1].text for conversation in conversations] == ['Hello?']
    complaints = err.splitlines()
    assert len(complaints) == 4
    assert 'no image file at' in complaints[0]
    assert '/image needs a file' in complaints[1]
    assert 'no command /imagine' in complaints[2]
    assert 'is not UTF-8' in complaints[3]


def test_clear_forgets(answerer, image, monkeypatch, capsys):
    lines = [f"/image '{image}'", 'One?', '/clear', '/etc/hosts is what?']
    conversations, _, _ = talk(answerer, lines, monkeypatch, capsys)
    assert len(conversations[0].images) == 1
    assert conversations[1] == ask('/etc/hosts is what?')


def test_an_image_that_vanished_is_told_and_can_be_cleared(answerer, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'gone.png'
    Image.new('RGB', (60, 40)).save(path)
    session = ChatSession()
    session.add_image(str(path))
    path.unlink()
    monkeypatch.setattr(sys, 'stdin', io.StringIO('What?\n/clear\nHello?\n'))
    Terminal(session, answerer).run()
    assert 'error: image not found' in capsys.readouterr().err
    assert [message.role for message in session.history.messages] == ['user', 'assistant']


@pytest.fixture(scope='module')
def talker(tiny_model):
    """A model that says many words."""
    path = str(tiny_model('llama', amplify=4.0))
    model, _ = load_model(path, dtype=torch.float32)
    return Answerer(model, Processor(path), settings=dict(max_new_tokens=40, do_sample=False))


class Interrupted(Answerer):
    """The user presses Ctrl-C at the third piece of the answer to 'long'."""

    def answer(self, conversation, write):
        pieces = []

        def stop(piece):
            write(piece)
            pieces.append(piece)
            if len(pieces) == 3 and conversation.messages[-1].text == 'long':
                raise KeyboardInterrupt

        return super().answer(conversation, stop)


def test_ctrl_c_stops_the_answer_keeps_what_was_said_and_goes_on(talker, monkeypatch, capsys):
    whole = talker.answer(ask('long'), lambda _: None)
    interrupted = Interrupted(talker.model, talker.processor, settings=talker.settings)
    session = ChatSession()
    monkeypatch.setattr(sys, 'stdin', io.StringIO('long\nshort\n'))
    Terminal(session, interrupted).run()
    first, second = (message.text for message in session.history.messages if message.role == 'assistant')
    assert 0 < len(first) < len(whole)
    assert whole.startswith(first)
    assert second
    assert capsys.readouterr().out.startswith(first)


def test_ctrl_c_at_the_prompt_drops_the_line(talker, monkeypatch):
    lines = iter([KeyboardInterrupt, 'short', EOFError])

    def read(prompt=''):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr('builtins.input', read)
    session = ChatSession()
    Terminal(session, talker).run()
    assert [message.text for message in session.history.messages if message.role == 'user'] == ['short']


def test_a_conversation_through_the_command_line(llava, image):
    """Standard output holds the answers, standard error the rest; the end of the input ends the chat."""
    command = [sys.executable, '-m', 'vlmtune', 'chat', llava, '--max-new-tokens', '4']
    lines = f'/image {image}\n{WORDS}\n/image nowhere.png\nAnd now?\n'
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    first = expected(llava, ask(WORDS, image), max_new_tokens=4)
    assert done.stdout.split('\n')[0] == first
    assert len(done.stdout.split('\n')) == 2 + 1
    assert 'no image file at' in done.stderr
    assert 'on cpu' in done.stderr
