"""The Python form of the chat."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from vlmtune.apps.chat.answering import load_answerer
from vlmtune.chat import Chat
from vlmtune.data.map_fns.openai import openai_map_fn
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
QUESTION = 'What colour is the square?'


@pytest.fixture(scope='module')
def llava(tiny_model):
    return str(tiny_model('llava', amplify=4.0))


@pytest.fixture(scope='module')
def png(tmp_path_factory):
    path = tmp_path_factory.mktemp('image') / 'square.png'
    Image.new('RGB', (60, 40), 'red').save(path)
    return path


@pytest.fixture
def chat(llava):
    return Chat(llava, max_new_tokens=6)


def test_an_image_in_any_form_gives_the_same_answer(chat, llava, png):
    shown = Conversation((Message('user', (ImagePart(0), TextPart(QUESTION))),), (ImageRef(path=str(png)),))
    expected = load_answerer(llava, settings=dict(max_new_tokens=6)).answer(shown)
    blue = io.BytesIO()
    Image.new('RGB', (60, 40), 'blue').save(blue, 'PNG')
    text = base64.b64encode(png.read_bytes()).decode()
    for form in (str(png), png, [png], png.read_bytes(), text, f'data:image/png;base64,{text}', Image.open(png)):
        assert chat.ask(QUESTION, form) == expected
        chat.clear()
    assert chat.ask(QUESTION, blue.getvalue()) != expected
    assert expected


def test_it_remembers_and_forgets(chat, png):
    first = chat.ask(QUESTION, [png, Image.new('RGB', (8, 8))])
    pieces = []
    second = chat.ask('And now?', write=pieces.append)
    assert ''.join(pieces).strip() == second
    assert [(m.role, m.image_indices, m.text) for m in chat.history.messages] == [
        ('user', (0, 1), QUESTION),
        ('assistant', (), first),
        ('user', (), 'And now?'),
        ('assistant', (), second),
    ]
    chat.clear()
    assert chat.history == Conversation(())


def test_settings_of_one_question(chat):
    long = chat.ask(QUESTION, images=None)
    chat.clear()
    assert long.startswith(short := chat.ask(QUESTION, max_new_tokens=2))
    assert short != long
    chat.clear()
    assert chat.ask(QUESTION, should_stop=lambda: True) == long[: len(chat.history.messages[1].text)] != long
    with pytest.raises(ConfigError, match='--temperature'):
        chat.ask(QUESTION, temperature=-1)
    with pytest.raises(ConfigError, match="temprature: no setting of a chat, did you mean 'temperature'"):
        chat.ask(QUESTION, temprature=1)


def test_examples_and_system_come_first(llava, png):
    chat = Chat(llava, max_new_tokens=2, system='Be brief.', examples=[(png, 'Colour?', 'red'), (None, 'Sure?', 'yes')])
    assert [m.role for m in chat.history.messages] == ['system', 'user', 'assistant', 'user', 'assistant']
    assert len(chat.history.images) == 1


def test_a_mistake_leaves_the_chat_as_it_was(chat, png, tmp_path):
    cut = tmp_path / 'cut.png'
    cut.write_bytes(png.read_bytes()[:-30])
    for wrong, match in (
        ([png, 'none.png'], 'no image file at'),
        (cut, 'cannot be read'),
        ('https://example.org/a.png', 'download it first'),
        (b'no image', 'not an image file'),
        (7, 'image of type int'),
    ):
        with pytest.raises(DataError, match=match):
            chat.ask(QUESTION, wrong)
        assert chat.session.waiting == ()
        assert chat.history == Conversation(())


def test_what_is_saved_is_a_row_of_training_data(chat, png, tmp_path):
    file = tmp_path / 'talk.jsonl'
    with pytest.raises(DataError, match='nothing to save'):
        chat.save(str(file))
    chat.ask('<image> is a mark?', [png, png.read_bytes()])
    chat.save(str(file))
    chat.ask('And now?')
    chat.save(str(file))  # its own file
    (row,) = file.read_text(encoding='utf-8').splitlines()
    assert openai_map_fn(json.loads(row)) == chat.history
    (tmp_path / 'mine.txt').write_text('mine', encoding='utf-8')
    for taken in (tmp_path / 'mine.txt', tmp_path, tmp_path / 'none' / 'talk.jsonl'):
        with pytest.raises(DataError, match='exists; nothing was written|cannot be written'):
            chat.save(str(taken))
    assert (tmp_path / 'mine.txt').read_text(encoding='utf-8') == 'mine'


def test_wrong_settings_are_told_before_the_model_is_loaded():
    with pytest.raises(ConfigError, match='--top-p'):
        Chat('/no/model', top_p=2.0)
    with pytest.raises(ConfigError, match=r"top_q: no setting of a chat, did you mean 'top_[kp]'\?; there are"):
        Chat('/no/model', top_q=2.0)


def test_the_example_of_the_page(tmp_path, monkeypatch, png, capsys):
    (block,) = re.findall(
        r'```python run\n(.*?)```', (ROOT / 'docs' / 'chat.md').read_text(encoding='utf-8'), re.DOTALL
    )
    (tmp_path / 'quickstart').symlink_to(ROOT / 'quickstart')
    Image.open(png).save(tmp_path / 'picture.png')
    monkeypatch.chdir(tmp_path)
    exec(compile(block, 'docs/chat.md', 'exec'), names := {})
    assert names['answer'] in ('yes', 'no')
    assert capsys.readouterr().out.strip() in ('yes', 'no')
    assert (tmp_path / 'talk.jsonl').is_file()
