"""``vlmtune chat``: one question, or a conversation at the terminal."""

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import torch

from vlmtune.apps.answering import Answerer, generation_settings, load_answerer
from vlmtune.apps.chat_session import ChatSession
from vlmtune.utils.errors import UserError

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  # gives input() line editing and a history

logger = logging.getLogger(__name__)

_HELP = '/image FILE shows an image with the next message, /clear forgets everything, /exit (or Ctrl-D) leaves'


def chat(
    model: str,
    *,
    adapter: str | None = None,
    images: Sequence[str] = (),
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    bits: int | None = None,
) -> None:
    """Answer one question, or talk.

    With ``prompt``, the answer and nothing else goes to standard output. Without it, lines are read from standard
    input until its end or ``/exit``.

    Args:
        model: a folder or a hub id; the folder of an adapter means its base and the adapter.
        adapter: a PEFT adapter on top of it; its processor files win over the model's.
        images: files that are shown with the first message.
        prompt: the question.
        system: system message.
        max_new_tokens: of an answer.
        temperature: 0 or None is greedy.
        top_p: None or 1 is no limit.
        top_k: None or 0 is no limit.
        seed: makes sampled answers repeatable.
        bits: 4 or 8 loads the language model quantised.

    Raises:
        UserError: the model cannot be loaded, or an image cannot be read.
    """
    settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    for image in images:
        ChatSession().add_image(image)  # before the model is loaded, which takes a while
    answerer = load_answerer(model, adapter=adapter, bits=bits, settings=settings)
    session = ChatSession(system=system, takes_images=answerer.processor.family.has_vision)
    for image in images:
        session.add_image(image)
    if seed is not None:
        torch.manual_seed(seed)
    if prompt is not None:
        answerer.answer(session.ask(prompt), _write)
        _write('\n')
        return
    logger.info(_HELP)
    Terminal(session, answerer).run()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Terminal:
    """Reads lines, runs commands, prints answers. No mistake of the user's ends it.

    Args:
        session: what was said.
        answerer: the model.
        errors: where complaints go; standard error by default.
    """

    def __init__(self, session: ChatSession, answerer: Answerer, *, errors: TextIO | None = None) -> None:
        self.session, self.answerer, self.errors = session, answerer, errors
        self._commands: dict[str, Callable[[str], None]] = {
            '/image': self._image,
            '/clear': self._clear,
            '/help': lambda _: self._say(_HELP),
        }

    def run(self) -> None:
        """Talk until ``/exit`` or the end of the input."""
        while (line := self._read()) is not None:
            command, _, rest = line.partition(' ')
            if command == '/exit':
                return
            try:
                if command in self._commands:
                    self._commands[command](rest.strip())
                elif command.startswith('/') and command[1:].isalpha():
                    self._say(f'error: there is no command {command}; {_HELP}')
                elif line:
                    self._answer(line)
            except UserError as error:
                self._say(f'error: {error}')
            except torch.OutOfMemoryError:
                self._say('error: out of memory; /clear makes room')

    def _read(self) -> str | None:
        """The next line without white space around it; '' after Ctrl-C, None at the end."""
        prompt = f'[{len(self.session.waiting)} image(s)] > ' if self.session.waiting else '> '
        try:
            return input(prompt if sys.stdin.isatty() else '').strip()
        except KeyboardInterrupt:
            self._say('')
            return ''
        except EOFError:
            return None

    def _answer(self, text: str) -> None:
        asked = self.session.ask(text)
        answer = self.answerer.answer(asked, _write)
        _write('\n')
        self.session.record(asked, answer)

    def _image(self, file: str) -> None:
        if not file:
            self._say('error: /image needs a file')
            return
        size = self.session.add_image(file.strip('\'"'))
        self._say(f'{file}, {size.width} x {size.height} pixels, goes with the next message')

    def _clear(self, _: str) -> None:
        self.session.clear()
        self._say('forgotten')

    def _say(self, text: str) -> None:
        print(text, file=self.errors or sys.stderr)
