"""Boxes of answers, printed and drawn, alone and through the chat."""

import io
import json
import sys

import pytest
from PIL import ExifTags, Image

from vlmtune.apps.chat import chat
from vlmtune.apps.chat.answering import Answerer
from vlmtune.apps.chat.boxes import report_boxes
from vlmtune.apps.chat.session import ChatSession
from vlmtune.apps.chat.terminal import Terminal
from vlmtune.data import Processor
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, TextPart
from vlmtune.utils.errors import ConfigError

ANSWER = 'A dog at [100, 500, 250, 1000].'


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    """400 x 300 pixels, lying on its side in the file."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path_factory.mktemp('photo') / 'photo.jpg'
    Image.new('RGB', (300, 400), 'white').save(path, exif=exif)
    return str(path)


@pytest.fixture(scope='module')
def model(tiny_model):
    return str(tiny_model('qwen3_vl'))


@pytest.fixture(scope='module')
def processor(model):
    return Processor(model)


def ask(*images):
    parts = [ImagePart(i) for i in range(len(images))]
    return Conversation((Message('user', (*parts, TextPart('Where?'))),), tuple(ImageRef(path=i) for i in images))


def test_boxes_are_pixels_of_the_last_image_upright(processor, photo, tmp_path, capsys):
    Image.new('RGB', (10, 10)).save(tmp_path / 'other.png')
    report_boxes(ANSWER, asked=ask(str(tmp_path / 'other.png'), photo), processor=processor)
    assert json.loads(capsys.readouterr().out) == {'image': photo, 'boxes': [[40, 150, 100, 300]]}
    report_boxes('No dog.', asked=ask(photo), processor=processor)
    assert json.loads(capsys.readouterr().out) == {'image': photo, 'boxes': []}


def test_boxes_are_drawn_and_nothing_else_is_said(processor, photo, tmp_path, capsys):
    report_boxes(ANSWER, asked=ask(photo), processor=processor, show=False, draw_to=str(tmp_path / 'out.png'))
    with Image.open(tmp_path / 'out.png') as drawn:
        assert drawn.size == (400, 300)
        assert min(drawn.getpixel((40, 200))) < 200  # JPEG white is nearly 255
        assert min(drawn.getpixel((20, 200))) > 250
    assert capsys.readouterr().out == ''


def test_without_an_image_or_a_wish_there_is_nothing_to_do(processor, photo, tmp_path, capsys):
    report_boxes(ANSWER, asked=ask(), processor=processor, draw_to=str(tmp_path / 'out.png'))
    report_boxes(ANSWER, asked=ask(photo), processor=processor, show=False)
    assert capsys.readouterr().out == ''
    assert not (tmp_path / 'out.png').exists()


def test_a_file_that_cannot_be_written_is_told_before_the_model_is_loaded(photo, tmp_path):
    for file, says in (
        ('boxes', 'expected the name of an image file, for example boxes.png'),
        ('boxes.txt', 'expected the name of an image file'),
        (str(tmp_path / 'nowhere' / 'boxes.png'), f'there is no folder {tmp_path / "nowhere"}'),
    ):
        with pytest.raises(ConfigError, match=says):
            chat('no such model', images=[photo], prompt='Where?', draw_boxes=file)


def test_one_question_ends_with_the_boxes(model, photo, tmp_path, capsys):
    options = dict(images=[photo], prompt='Where?', max_new_tokens=4)
    chat(model, **options)
    answer = capsys.readouterr().out
    chat(model, **options, boxes=True, draw_boxes=str(tmp_path / 'out.png'))
    said = capsys.readouterr().out
    assert said.startswith(answer)
    assert json.loads(said.removeprefix(answer)) == {'image': photo, 'boxes': []}
    assert (tmp_path / 'out.png').is_file()


class Sure(Answerer):
    """Finds the same box in every image."""

    def answer(self, conversation, write):
        write(ANSWER)
        return ANSWER


def test_a_conversation_reports_every_answer_and_survives_a_full_disk(processor, photo, monkeypatch, capsys):
    reported = []

    def report(answer, *, asked):
        reported.append((answer, asked.messages[-1].text))
        report_boxes(answer, asked=asked, processor=processor, draw_to='/dev/full/boxes.png')

    session = ChatSession()
    session.add_image(photo)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('one\ntwo\n'))
    Terminal(session, Sure(None, processor), report=report).run()
    assert reported == [(ANSWER, 'one'), (ANSWER, 'two')]
    captured = capsys.readouterr()
    assert captured.out.count(json.dumps([[40, 150, 100, 300]])) == 2
    assert captured.err.count('error: --draw-boxes /dev/full/boxes.png: cannot be written') == 2
    assert len(session.history.messages) == 4
