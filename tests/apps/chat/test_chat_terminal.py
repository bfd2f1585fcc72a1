"""The terminal as a person sees it, through a pseudo terminal: a child of this process holds the other end."""

import io
import json
import os
import pty
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmtune.apps.chat import terminal as chat_terminal
from vlmtune.apps.chat.answering import Answerer
from vlmtune.apps.chat.session import ChatSession
from vlmtune.apps.chat.terminal import Terminal
from vlmtune.data import Processor
from vlmtune.data.map_fns.openai import openai_map_fn
from vlmtune.models import load_model

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 300  # seconds
CTRL_C, CTRL_D, UP, DELETE = '\x03', '\x04', '\x1b[A', '\x7f'


@pytest.fixture(scope='module')
def talker(tiny_model):
    """A model that says many words."""
    path = str(tiny_model('llava', amplify=4.0))
    model, _ = load_model(path, dtype=torch.float32)
    return Answerer(model, Processor(path), settings=dict(max_new_tokens=1000, do_sample=False))


class Person:
    """Types and reads at a terminal in which ``run`` runs."""

    def __init__(self, run):
        self.seen = ''
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            code = 70
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, 'w'), open(2, 'w')  # noqa: SIM115
                run()
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)

    def read_until(self, text):
        """What appears, through ``text``."""
        end, start = time.monotonic() + PATIENCE, len(self.seen)
        while text not in self.seen[start:]:
            assert time.monotonic() < end, f'no {text!r} in {self.seen[start:]!r}'
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.seen += os.read(self.terminal, 4096).decode()
        return self.seen[start:]

    def type(self, text, until='> '):
        os.write(self.terminal, text.encode())
        return self.read_until(until)

    def interrupt(self):
        """Ctrl-C at the prompt: a signal that comes before readline sleeps in ``select`` waits for the next key."""
        end = time.monotonic() + PATIENCE
        while not self._is_listening():
            assert time.monotonic() < end, f'it does not listen after {self.seen!r}'
            time.sleep(0.01)
        return self.type(CTRL_C)

    def _is_listening(self):
        takes_keys = not termios.tcgetattr(self.terminal)[3] & termios.ICANON  # readline has set up the terminal
        state = Path(f'/proc/{self.child}/stat').read_text(encoding='utf-8').rpartition(') ')[2]
        return takes_keys and state.startswith('S')

    def leave(self, text=f'{CTRL_D}'):
        os.write(self.terminal, text.encode())
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if select.select([self.terminal], [], [], 0.2)[0]:
                    self.seen += os.read(self.terminal, 4096).decode()
            except OSError:  # the child has closed its end
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.fixture
def sit_down(talker, tmp_path, monkeypatch):
    """``sit_down(max_new_tokens=4)``: a person at the terminal of a new chat."""
    monkeypatch.setattr(chat_terminal, 'HISTORY_FILE', tmp_path / 'cache' / 'history')
    people = []

    def start(*, bot_name=None, **settings):
        answerer = Answerer(talker.model, talker.processor, settings={**talker.settings, **settings})
        people.append(Person(lambda: Terminal(ChatSession(), answerer, bot_name=bot_name).run()))
        people[-1].read_until('> ')
        return people[-1]

    yield start
    for person in people:
        os.close(person.terminal)


def test_ctrl_c_stops_the_answer_and_nothing_else(sit_down, talker, tmp_path):
    person = sit_down()
    os.write(person.terminal, b'tell me everything\n')
    person.read_until('tell me everything')
    start = len(person.seen)
    while len(person.seen) < start + 20:  # it is talking
        person.seen += os.read(person.terminal, 4096).decode()
    person.type(CTRL_C)
    os.write(person.terminal, b'unfinished line')
    person.read_until('unfinished line')
    person.interrupt()
    person.interrupt()
    person.type(f'/save {tmp_path}/talk.jsonl\n')
    assert person.leave() == 0
    (question, answer) = openai_map_fn(json.loads((tmp_path / 'talk.jsonl').read_text(encoding='utf-8'))).messages
    assert question.text == 'tell me everything'
    assert answer.text
    shown = person.seen[start:].partition('\r\n> ')[0].replace('^C', '')  # the kernel writes that in between
    assert ''.join(answer.text.split()) == ''.join(shown.split())  # what was read is what is remembered
    assert len(talker.processor.tokenizer(answer.text)['input_ids']) < 500  # of 1000


def test_lines_can_be_edited_and_come_back_in_the_next_chat(sit_down, tmp_path):
    person = sit_down(max_new_tokens=2)
    assert 'helo' not in person.type(f'/halo{DELETE * 3}elp\n').split('\n')[-1]
    assert '/image FILE' in person.seen
    person.type('the first chat\n')
    assert person.leave('/exit\n') == 0
    file = tmp_path / 'cache' / 'history'
    assert file.read_text(encoding='utf-8').splitlines() == ['/help', 'the first chat', '/exit']
    assert file.stat().st_mode & 0o777 == 0o600
    person = sit_down(max_new_tokens=2)
    person.type(f'{UP}{UP}\n')
    assert 'the first chat' in person.seen
    assert person.leave('EXIT\n') == 0


def test_pictures_a_name_and_the_words_of_xtuner(sit_down, tmp_path):
    Image.new('RGB', (60, 40), 'red').save(tmp_path / 'a square.png')
    person = sit_down(max_new_tokens=2, bot_name='Ada')
    assert '60 x 40 pixels' in person.type(f"/image '{tmp_path}/a square.png'\n", until='[1 image(s)] > ')
    assert '\nAda: ' in person.type('What colour?\n', until='\n> ').replace('\r', '')
    assert 'forgotten' in person.type('RESET\n')
    assert person.leave('EXIT\n') == 0


def test_a_home_that_cannot_be_written_is_no_matter(sit_down, tmp_path, monkeypatch):
    (tmp_path / 'cache').write_text('no folder', encoding='utf-8')
    person = sit_down(max_new_tokens=2)
    person.type('hello\n')
    assert person.leave() == 0


@pytest.mark.slow
def test_the_command_at_a_real_terminal_with_the_model_of_the_quickstart(tmp_path):
    Image.new('RGB', (64, 64), 'white').save(tmp_path / 'white.png')
    command = [sys.executable, '-m', 'vlmtune', 'chat', str(ROOT / 'quickstart' / 'base'), '--max-new-tokens', '8']
    environment = {**os.environ, 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1', 'TERM': 'xterm'}
    person = Person(lambda: os.execve(sys.executable, command, environment))
    person.read_until('/help lists the commands\r\n> ')
    person.type(f'/image {tmp_path}/white.png\n', until='[1 image(s)] > ')
    answer = person.type('is there a red shaq\x7fpe?\n', until='\n> ').splitlines()[1]
    assert answer in ('yes', 'no')
    person.interrupt()
    assert person.leave() == 0
    assert 'is there a red shape?' in (tmp_path / '.cache' / 'vlmtune' / 'chat_history').read_text(encoding='utf-8')


# ---- without a terminal


def lines(talker, text, monkeypatch, capsys, **options):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
    answerer = Answerer(talker.model, talker.processor, settings=dict(max_new_tokens=4))
    session = ChatSession()
    Terminal(session, answerer, **options).run()
    return session, capsys.readouterr()


def test_standard_output_is_the_same_without_streaming_and_holds_no_name(talker, monkeypatch, capsys):
    _, streamed = lines(talker, 'one\ntwo\n', monkeypatch, capsys)
    _, whole = lines(talker, 'one\ntwo\n', monkeypatch, capsys, stream=False, bot_name='Ada')
    assert streamed.out == whole.out
    assert len(streamed.out.splitlines()) == 2


def test_names_that_no_file_can_have_are_told_and_the_chat_goes_on(talker, tmp_path, monkeypatch, capsys):
    wrong = ('a' * 300, '~nobody-of-this-name/x', f'{tmp_path}/a\0b')
    text = ''.join(f'/image {name}\nhello\n/save {name}\n' for name in wrong)
    session, captured = lines(talker, text, monkeypatch, capsys)
    told = captured.err.splitlines()
    assert len(told) == 2 * len(wrong)
    assert all(line.startswith('error: ') and ': no such file can be used (' in line for line in told)
    assert len(session.history.messages) == 2 * len(wrong)


@pytest.mark.parametrize(
    'typed', ['/image {0}/a b.png', '/image\t{0}/a b.png', "/image '{0}/a b.png' ", '/image {0}/a\\ b.png']
)
def test_a_file_name_as_it_is_typed_or_dropped_on_a_terminal(talker, tmp_path, monkeypatch, capsys, typed):
    Image.new('RGB', (6, 4)).save(tmp_path / 'a b.png')
    session, _ = lines(talker, f'{typed.format(tmp_path)}\n', monkeypatch, capsys)
    assert [image.path for image in session.waiting] == [f'{tmp_path}/a b.png']


def test_save_tells_what_is_wrong_and_goes_on(talker, tmp_path, monkeypatch, capsys):
    (tmp_path / 'taken').write_text('mine', encoding='utf-8')
    text = f'/save {tmp_path}/new\nhello\n/save\n/save {tmp_path}/taken\n/save {tmp_path}/new\n'
    _, captured = lines(talker, text, monkeypatch, capsys)
    told = captured.err.splitlines()
    assert [line.split(str(tmp_path))[0] for line in told] == [
        'error: there is nothing to save yet',
        'error: /save needs a file',
        'error: ',
        'written to ',
    ]
    assert 'exists; nothing was written' in told[2]
    assert (tmp_path / 'taken').read_text(encoding='utf-8') == 'mine'
