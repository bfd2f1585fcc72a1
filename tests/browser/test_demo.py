"""The demo in a real Chromium: the command with a real model, and voices of which one knows the words."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import expect

from tests.browser.conftest import PHONE
from tests.browser.late_streams import Stream, proxy
from vlmtune.apps.demo import build_demo, make_server, read_example_folder
from vlmtune.utils.ports import listen

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    '<img src=https://example.com/a.png onerror=alert(1)> ![x](https://example.com/b.png) <script>alert(2)</script>'
)
HARDLY_LISTENING = 6_000  # milliseconds
NOTE_WHAT_IS_SHOWN = """
    const chat = document.querySelector('#chat-0');
    window.shown = [chat.innerText];
    new MutationObserver(() => window.shown.push(chat.innerText)).observe(chat, {subtree: true, childList: true});
"""


class Speaker:
    """Says ``words``, one at a time; for ever if there are none. It stops when it is told to."""

    takes_images = True

    def __init__(self, *words, name='speaker', pause=0.02):
        self.words, self.name, self.pause = words, name, pause
        self.asked, self.stopped = [], threading.Event()

    def answer(self, conversation, write, *, settings, seed, should_stop):
        self.asked.append(conversation)
        said = ''
        while not should_stop() and (len(said.split()) < len(self.words) or not self.words):
            word = f'{self.words[len(said.split())] if self.words else "on"} '
            said += word
            write(word)
            time.sleep(self.pause)
        if should_stop():
            self.stopped.set()
        return said.strip()


@contextlib.contextmanager
def served(*voices, examples=None):
    """The address of a page on which these voices answer."""
    server = make_server(build_demo(voices, examples=examples))
    with listen('127.0.0.1', 0) as listener:
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            yield f'http://127.0.0.1:{listener.getsockname()[1]}'
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture(autouse=True)
def uploads(tmp_path, monkeypatch):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path / 'uploads'))
    monkeypatch.setenv('GRADIO_ANALYTICS_ENABLED', 'True')  # the page has its own mind


def draw(path, shape, colour):
    image = Image.new('RGB', (64, 64), 'white')
    getattr(ImageDraw.Draw(image), shape)((20, 20, 44, 44), fill=colour)
    image.save(path)
    return path


def answers(page, voice=0):
    return page.locator(f'#chat-{voice} .bot.message')


def send(page, text, *files):
    if files:
        page.locator('#message input[type=file]').set_input_files([str(file) for file in files])
        expect(page.locator('#message .thumbnail-item')).to_have_count(len(files))
    page.locator('#message textarea').fill(text)
    page.locator('#message .submit-button').click()


# ---- the command, with a real model


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    """``vlmtune demo quickstart/base``, with examples; it has to end well when it is interrupted."""
    folder = tmp_path_factory.mktemp('examples')
    draw(folder / 'circle.png', 'ellipse', 'blue')
    (folder / 'prompts.txt').write_text('Is there a circle in the picture?\n')
    command = [sys.executable, '-m', 'vlmtune', 'demo', 'quickstart/base', '--examples', str(folder), '--port', '0']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})
    for line in process.stderr:
        if found := re.search(r'open (http://127\.0\.0\.1:\d+) in a browser', line):
            break
    rest = threading.Thread(target=process.stderr.read, daemon=True)
    rest.start()
    yield found[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_two_pictures_in_one_chat_with_a_real_model(address, open_page, tmp_path):
    watched = open_page(address)
    page = watched.page
    send(page, 'Is there a circle in the picture?', draw(tmp_path / 'round.png', 'ellipse', 'red'))
    expect(answers(page)).to_have_text(['yes'])
    send(page, 'Is there a circle in the picture?', draw(tmp_path / 'square.png', 'rectangle', 'red'))
    expect(answers(page)).to_have_count(2)
    expect(page.locator('#message .submit-button')).to_be_visible()
    expect(page.locator('#chat-0 .user img')).to_have_count(2)
    expect(page.get_by_label('Share').first).not_to_be_visible()
    page.screenshot(path=tmp_path / 'demo.png')
    assert (watched.from_elsewhere(), watched.trouble) == ([], [])
    assert len(watched.fetched) > 10


def test_a_click_on_an_example_and_one_on_a_question_at_phone_width(address, open_page, tmp_path):
    watched = open_page(address, window=PHONE)
    page = watched.page
    for count in (1, 2):
        page.locator('#examples .thumbnail-lg').first.click()
        expect(page.locator('#message .thumbnail-item')).to_have_count(count)
    page.get_by_label('Remove file').first.click()
    expect(page.locator('#message .thumbnail-item')).to_have_count(1)
    page.locator('#prompts button').click()
    expect(answers(page)).to_have_text(['yes'])
    assert not watched.is_wider_than_its_window()
    page.locator('#settings button').first.click()
    expect(page.get_by_label('System message')).to_be_visible()
    assert not watched.is_wider_than_its_window()
    assert (watched.from_elsewhere(), watched.trouble) == ([], [])


# ---- voices of which one knows the words


def test_an_answer_streams_and_stops(open_page):
    voice = Speaker()
    with served(voice) as url:
        page = open_page(url).page
        send(page, 'why?')
        expect(answers(page)).to_contain_text('on on')
        expect(page.locator('#message .submit-button')).to_have_count(0)
        page.locator('#message .stop-button').click()
        assert voice.stopped.wait(60)
        expect(page.locator('#message .submit-button')).to_be_visible()
        voice.words = ('said', 'it')
        send(page, 'again?')
        expect(answers(page).nth(1)).to_have_text('said it')
    assert [message.role for message in voice.asked[1].messages] == ['user', 'assistant', 'user']


def test_an_answer_ends_when_the_browser_leaves(open_page):
    voice = Speaker()
    with served(voice) as url:
        page = open_page(url).page
        send(page, 'why?')
        expect(answers(page)).to_contain_text('on on')
        page.close()
        assert voice.stopped.wait(60)
        voice.words = ('next',)
        other = open_page(url).page
        send(other, 'and me?')
        expect(answers(other)).to_have_text(['next'])


def test_before_and_after_stand_beside_each_other_and_a_new_chat_clears_both(open_page):
    before, after = Speaker('old', name='before: base'), Speaker('new', name='after: mine')
    with served(before, after) as url:
        page = open_page(url).page
        send(page, 'why?')
        expect(answers(page, 0)).to_have_text(['old'])
        expect(answers(page, 1)).to_have_text(['new'])
        places = [page.locator(f'#chat-{i}').bounding_box() for i in (0, 1)]
        assert places[0]['y'] == places[1]['y']
        assert places[0]['x'] + places[0]['width'] <= places[1]['x']
        page.locator('#new-chat').click()
        expect(page.locator('.message')).to_have_count(0)
        narrow = open_page(url, window=PHONE)
        expect(narrow.page.locator('#chat-1')).to_be_visible()
        assert not narrow.is_wider_than_its_window()


def test_hostile_answers_and_questions_are_text(open_page):
    with served(Speaker(*HOSTILE.split(' '))) as url:
        watched = open_page(url)
        dialogs = []
        watched.page.on('dialog', lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        send(watched.page, HOSTILE)
        expect(answers(watched.page)).to_have_text([HOSTILE])
        expect(watched.page.locator('#message .submit-button')).to_be_visible()
        assert (dialogs, watched.from_elsewhere(), watched.trouble) == ([], [], [])


def test_lines_of_an_answer_stay_lines(open_page):
    table = '| a |\n|  1  2 |\n\n  indented'
    voice = Speaker()
    voice.answer = lambda conversation, write, **_: write(table) or table
    with served(voice) as url:
        page = open_page(url).page
        send(page, 'why?')
        expect(answers(page)).to_contain_text('indented')
        assert answers(page).inner_text() == table


def test_what_is_no_picture_is_told_and_the_message_stays(open_page, tmp_path):
    (tmp_path / 'notes.png').write_text('no picture')
    voice = Speaker('fine')
    with served(voice) as url:
        page = open_page(url).page
        send(page, 'why?')
        expect(answers(page)).to_have_text(['fine'])
        expect(page.locator('#message .submit-button')).to_be_visible()
        send(page, 'what is it?', tmp_path / 'notes.png')
        expect(page.locator('.toast-body')).to_contain_text('not an image file: notes.png; expected JPEG')
        expect(page.locator('#message textarea')).to_have_value('what is it?')
        expect(answers(page)).to_have_text(['fine'])
    assert len(voice.asked) == 1


def test_a_new_chat_in_the_middle_of_an_answer(open_page):
    voice = Speaker()
    with served(voice) as url:
        page = open_page(url).page
        send(page, 'why?')
        expect(answers(page)).to_contain_text('on on')
        page.locator('#new-chat').click()
        assert voice.stopped.wait(60)
        expect(page.locator('#message .submit-button')).to_be_visible()
        expect(page.locator('#chat-0 .message')).to_have_count(0)
        page.evaluate(NOTE_WHAT_IS_SHOWN)
        voice.words = ('fine',)
        send(page, 'and now?')
        expect(answers(page)).to_have_text(['fine'])
        assert [shown for shown in page.evaluate('window.shown') if 'on on' in shown] == []
    assert len(voice.asked[1].messages) == 1


def test_a_question_that_is_sent_while_the_stream_of_events_ends(open_page):
    voice, stream = Speaker(), Stream(b'/queue/data?', last=b'process_completed')
    with served(voice) as url, proxy(urlsplit(url).port, stream) as slow:
        page = open_page(slow).page
        send(page, 'why?')
        expect(answers(page)).to_contain_text('on on')
        stream.ended.clear()
        stream.flows.clear()
        page.locator('#new-chat').click()
        expect(page.locator('#chat-0 .message')).to_have_count(0)
        assert stream.ended.wait(60)
        voice.words = ('fine',)
        with page.expect_response(re.compile('/queue/join')):
            send(page, 'and now?')
        page.wait_for_timeout(HARDLY_LISTENING)
        stream.flows.set()
        expect(answers(page)).to_have_text(['fine'])
        expect(page.locator('#message .submit-button')).to_be_visible()


def test_nothing_but_this_machine_is_connected_to(open_page, tmp_path):
    examples = tmp_path / 'examples'
    examples.mkdir()
    draw(examples / 'circle.png', 'ellipse', 'blue')
    connected, is_over = [], threading.Event()

    def note(event, arguments):
        if event == 'socket.connect' and not is_over.is_set():
            connected.append(arguments[1])

    sys.addaudithook(note)
    with served(Speaker('fine'), examples=read_example_folder(examples)) as url:
        page = open_page(url).page
        send(page, 'what is it?', draw(tmp_path / 'mine.png', 'ellipse', 'red'))
        expect(answers(page)).to_have_text(['fine'])
        assert list((tmp_path / 'uploads').rglob('mine.png'))
    is_over.set()
    assert not list((tmp_path / 'uploads').rglob('mine.png'))  # nothing that was uploaded is kept
    assert [place for place in connected if isinstance(place, tuple) and place[0] not in ('127.0.0.1', '::1')] == []
