"""``vlmtune chat``: one question, or a conversation at the terminal."""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TextIO, TypeAlias

import torch

from vlmtune.apps.answer_boxes import check_drawing, report_boxes
from vlmtune.apps.answering import Answerer, generation_settings, load_answerer
from vlmtune.apps.chat_session import ChatSession, read_examples
from vlmtune.utils.errors import UserError

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  # gives input() line editing and a history

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[..., None]
"""``report(answer, asked=conversation)``: what else is done with an answer."""

_HELP = '/image FILE shows an image with the next message, /clear forgets everything, /exit (or Ctrl-D) leaves'


def chat(
    model: str,
    *,
    adapter: str | None = None,
    images: Sequence[str] = (),
    prompt: str | None = None,
    system: str | None = None,
    examples: Sequence[Sequence[str]] = (),
    max_new_tokens: int = 512,
    temperature: float | None = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    bits: int | None = None,
    boxes: bool = False,
    draw_boxes: str | None = None,
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
        examples: image, question and answer of each turn that is shown before (few-shot), see ``read_examples``.
        max_new_tokens: of an answer.
        temperature: 0 or None is greedy.
        top_p: None or 1 is no limit.
        top_k: None or 0 is no limit.
        seed: makes sampled answers repeatable.
        bits: 4 or 8 loads the language model quantised.
        boxes: print the boxes of every answer, in pixels of the last image shown.
        draw_boxes: image file into which the boxes of the latest answer are drawn.

    Raises:
        UserError: the model cannot be loaded, an image cannot be read, or ``draw_boxes`` cannot be written.
    """
    if draw_boxes is not None:
        check_drawing(draw_boxes)
    settings = generation_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    shown = read_examples(examples, prompt=prompt)
    early = ChatSession(examples=shown)  # finds a bad image before the model is loaded, which takes a while
    for image in images:
        early.add_image(image)
    answerer = load_answerer(model, adapter=adapter, bits=bits, settings=settings)
    session = ChatSession(system=system, takes_images=answerer.processor.family.has_vision, examples=shown)
    for image in images:
        session.add_image(image)
    if seed is not None:
        torch.manual_seed(seed)
    report = functools.partial(report_boxes, processor=answerer.processor, show=boxes, draw_to=draw_boxes)
    if prompt is not None:
        asked = session.ask(prompt)
        answer = answerer.answer(asked, _write)
        _write('\n')
        report(answer, asked=asked)
        return
    logger.info(_HELP)
    Terminal(session, answerer, report=report).run()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Terminal:
    """Reads lines, runs commands, prints answers. No mistake of the user's ends it.

    Args:
        session: what was said.
        answerer: the model.
        report: gets every answer, and as ``asked`` the conversation before it.
        errors: where complaints go; standard error by default.
    """

    def __init__(
        self,
        session: ChatSession,
        answerer: Answerer,
        *,
        report: Report | None = None,
        errors: TextIO | None = None,
    ) -> None:
        self.session, self.answerer, self.report, self.errors = session, answerer, report, errors
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
        if self.report is not None:
            self.report(answer, asked=asked)

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
