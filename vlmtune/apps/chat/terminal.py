"""A conversation at the terminal: lines, commands, answers."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, TypeAlias

import torch

from vlmtune.apps.chat.answering import Answerer
from vlmtune.apps.chat.session import ChatSession
from vlmtune.structures import Conversation
from vlmtune.utils.errors import UserError

try:
    import readline  # also gives input() line editing
except ImportError:  # not on Windows
    readline = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[..., None]
"""``report(answer, asked=conversation)``: what else is done with an answer."""

HISTORY_FILE = Path('~/.cache/vlmtune/chat_history')
_MOST_LINES = 1000  # of the history file
_HELP = """\
/image FILE  shows an image with the next message; again for another one
/save FILE   writes the conversation as a row of training data
/clear       forgets everything that was said and shown
/exit        leaves, and so does Ctrl-D
Ctrl-C       stops an answer"""
_OF_XTUNER = {'EXIT': '/exit', 'RESET': '/clear'}


def say_answer(answerer: Answerer, asked: Conversation, *, stream: bool = True, name: str | None = None) -> str:
    """Print an answer and a line break to standard output; returns the answer.

    Args:
        answerer: the model.
        asked: ends with the question.
        stream: print words as they come, not the whole answer at its end.
        name: stands before the answer.
    """
    _write(f'{name}: ' if name else '')
    if stream:
        answer = answerer.answer(asked, _write)
        _write('\n')
    else:
        answer = answerer.answer(asked)
        _write(f'{answer}\n')
    return answer


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Terminal:
    """Reads lines, runs commands, prints answers. No mistake of the user's ends it, and neither does Ctrl-C.

    Args:
        session: what was said.
        answerer: the model.
        report: gets every answer, and as ``asked`` the conversation before it.
        errors: where complaints go; standard error by default.
        stream: print answers word by word.
        bot_name: stands before every answer where a person is watching.
    """

    def __init__(
        self,
        session: ChatSession,
        answerer: Answerer,
        *,
        report: Report | None = None,
        errors: TextIO | None = None,
        stream: bool = True,
        bot_name: str | None = None,
    ) -> None:
        self.session, self.answerer, self.report, self.errors = session, answerer, report, errors
        self.stream, self.bot_name = stream, bot_name
        self._commands: dict[str, Callable[[str], None]] = {
            '/image': self._image,
            '/clear': self._clear,
            '/save': self._save,
            '/help': lambda _: self.say(_HELP),
        }

    def run(self) -> None:
        """Talk until ``/exit`` or the end of the input."""
        if sys.stdin.isatty():
            self.say('/help lists the commands')
        with _remembered_lines():
            going = True
            while going:
                try:
                    going = self._turn()
                except KeyboardInterrupt:  # at the prompt, or between two tokens' worth of work
                    self.say('')

    def _turn(self) -> bool:
        """Read a line and do what it says; False ends the conversation."""
        line = self._read()
        if line is None:
            return False
        command, *rest = _OF_XTUNER.get(line, line).split(maxsplit=1) or ['']
        if command == '/exit':
            return False
        try:
            if command in self._commands:
                self._commands[command](''.join(rest))
            elif command.startswith('/') and command[1:].isalpha():
                self.say(f'error: there is no command {command}; /help lists them')
            elif line:
                self._answer(line)
        except UserError as error:
            self.say(f'error: {error}')
        except torch.OutOfMemoryError:
            self.say('error: out of memory; /clear makes room')
        return True

    def say(self, text: str) -> None:
        """Tell the user something that is no answer."""
        print(text, file=self.errors or sys.stderr)

    def _read(self) -> str | None:
        """The next line without white space around it; None at the end."""
        prompt = f'[{len(self.session.waiting)} image(s)] > ' if self.session.waiting else '> '
        try:
            return input(prompt if sys.stdin.isatty() else '').strip()
        except EOFError:
            if sys.stdin.isatty():
                self.say('')
            return None
        except UnicodeDecodeError:
            self.say(f'error: the line is not {sys.stdin.encoding}; it was left out')
            return ''

    def _answer(self, text: str) -> None:
        asked = self.session.ask(text)
        name = self.bot_name if sys.stdin.isatty() else None
        answer = say_answer(self.answerer, asked, stream=self.stream, name=name)
        self.session.record(asked, answer)
        if self.report is not None:
            self.report(answer, asked=asked)

    def _image(self, file: str) -> None:
        if not file:
            self.say('error: /image needs a file')
            return
        size = self.session.add_image(_as_typed(file))
        self.say(f'{file}, {size.width} x {size.height} pixels, goes with the next message')

    def _clear(self, _: str) -> None:
        self.session.clear()
        self.say('forgotten')

    def _save(self, file: str) -> None:
        if not file:
            self.say('error: /save needs a file')
            return
        self.say(f'written to {self.session.save(file)}')


def _as_typed(file: str) -> str:
    """The name of a file as it stands, or as a shell reads it: dropped on a terminal it comes quoted or escaped."""
    try:
        words = shlex.split(file)
    except ValueError:  # a quote that is not closed
        return file
    return file if len(words) != 1 or os.path.isfile(os.path.expanduser(file)) else words[0]


@contextlib.contextmanager
def _remembered_lines() -> Iterator[None]:
    """Inside, a person's arrow keys bring back lines of this conversation and of earlier ones."""
    if readline is None or not sys.stdin.isatty():
        yield
        return
    file = HISTORY_FILE.expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(_MOST_LINES)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            logger.debug('%s could not be written: %s', file, error)
