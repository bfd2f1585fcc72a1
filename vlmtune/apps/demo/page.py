"""The page of the demo, on Gradio: chat windows, a message box, examples, settings."""

import html
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlmtune.apps.chat.session import check_text
from vlmtune.apps.demo.examples import Examples
from vlmtune.apps.demo.settings import gr, read_settings, show_settings
from vlmtune.apps.demo.turns import Turn, to_conversation, to_messages
from vlmtune.apps.demo.voices import Speaking, Voice
from vlmtune.data.images import load_image, read_image_size
from vlmtune.structures import ImageRef
from vlmtune.utils.errors import DataError, UserError

logger = logging.getLogger(__name__)

_THUMBNAIL = (320, 320)  # pixels at most
_HOUR = 3600
_CHAT_HEIGHT = 'max(320px, calc(100vh - 420px))'
# A browser that sends while its stream of events ends believes that it still listens, and hears nothing. The next event
# that it sends mends that.
_LISTEN_AGAIN = """() => {
    for (let seconds = 2; seconds < 100; seconds *= 2)
        setTimeout(() => document.querySelector('#listen')?.click(), 1000 * seconds)
}"""
_PRIVATE: dict[str, Any] = dict(api_visibility='private', show_progress='hidden')
_AT_ONCE: dict[str, Any] = dict(**_PRIVATE, queue=False)


def build_demo(
    voices: Sequence[Voice], *, examples: Examples | None = None, system: str = '', max_new_tokens: int = 512
) -> 'gr.Blocks':
    """A Gradio page on which one chats with a model, or with two beside each other.

    Args:
        voices: of ``load_voices``; all get the same questions.
        examples: of ``read_example_folder``.
        system: system message that stands in the settings at first.
        max_new_tokens: of an answer, at first.
    """
    return DemoPage(voices, examples or Examples()).build(system=system, max_new_tokens=max_new_tokens)


class DemoPage:
    """What happens on the page. One object serves all browsers; what each has said is in its own state.

    Args:
        voices: who answers.
        examples: pictures and questions to click.
    """

    def __init__(self, voices: Sequence[Voice], examples: Examples) -> None:
        self.voices, self.examples = tuple(voices), examples
        self._takes_images = all(voice.takes_images for voice in self.voices)
        self._speaking = Speaking()
        self._originals: list[str] = []
        self._answering: dict[str, threading.Event] = {}  # session -> stops its answer

    # ---- what is to be seen

    def build(self, *, system: str, max_new_tokens: int) -> 'gr.Blocks':
        """The page; see ``build_demo``."""
        page = gr.Blocks(
            title='vlmtune demo',
            analytics_enabled=False,
            fill_width=len(self.voices) > 1,
            delete_cache=(_HOUR, 24 * _HOUR),
        )
        with page:
            turns = gr.State(())
            with gr.Row():
                chats = [_chat_window(voice.name, i) for i, voice in enumerate(self.voices)]
            box = gr.MultimodalTextbox(**_ready(), **self._box_options())
            buttons = self._prompt_buttons()
            gallery = self._gallery(box)
            listen = gr.Button(visible='hidden', elem_id='listen')
            new = gr.Button('New chat', elem_id='new-chat', size='sm')
            with gr.Accordion('Settings', open=False, elem_id='settings'):
                settings = show_settings(system=system, max_new_tokens=max_new_tokens)
            # ---- what happens
            take: dict[str, Any] = dict(fn=self.take, inputs=[box, turns], outputs=[box, turns, *chats], **_PRIVATE)
            filled = [button.click(_fills(text), box, box, **_AT_ONCE) for button, text in buttons]
            senders: list[Any] = [box.submit, *(event.success for event in filled)]
            for sends in senders:
                asked = sends(**take)
                answered = asked.success(
                    self.answer, [turns, *settings], [turns, *chats], concurrency_id='answers', **_PRIVATE
                )
                answered.then(_ready_box, None, box, **_AT_ONCE)
                sends(None, js=_LISTEN_AGAIN, **_PRIVATE)
            listen.click(_nothing, trigger_mode='multiple', **_PRIVATE)  # an earlier one may be what was not heard
            box.stop(self.stop, None, None, **_AT_ONCE)
            for clears in (new.click, *(chat.clear for chat in chats)):
                clears(self.clear, None, [box, turns, *chats], **_AT_ONCE)
            if gallery is not None:
                gallery.select(self.pick, box, [box, gallery], **_AT_ONCE)
            page.unload(self.leave)
        return page.queue(default_concurrency_limit=1)

    def _box_options(self) -> dict[str, Any]:
        return dict(
            elem_id='message',
            show_label=False,
            placeholder='Ask about a picture' if self._takes_images else 'Ask',
            sources=['upload'] if self._takes_images else [],
            file_count='multiple',
            file_types=['image'],
            max_plain_text_length=100_000,
        )

    def _prompt_buttons(self) -> list[tuple['gr.Button', str]]:
        if not self.examples.prompts:
            return []
        with gr.Row(elem_id='prompts'):
            return [(gr.Button(text, size='sm', min_width=120), text) for text in self.examples.prompts]

    def _gallery(self, box: 'gr.MultimodalTextbox') -> 'gr.Gallery | None':
        """Thumbnails; and copies of the originals where browsers may get them, as they may no other file of theirs."""
        pictures = self.examples.pictures
        if not pictures or not self._takes_images:
            return None
        small = [load_image(ImageRef(path=str(picture.path))) for picture in pictures]
        for image in small:
            image.thumbnail(_THUMBNAIL)
        store = gr.processing_utils.save_file_to_cache
        self._originals = [store(picture.path, cache_dir=box.GRADIO_CACHE) for picture in pictures]
        return gr.Gallery(
            small,
            show_label=False,
            elem_id='examples',
            object_fit='cover',
            allow_preview=False,
            interactive=False,
            buttons=[],
        )

    # ---- what happens

    def take(self, request: 'gr.Request', message: dict[str, Any], turns: tuple[Turn, ...]) -> list[Any]:
        """A question was sent: show it, and turn the button into one that stops."""
        session = str(request.session_hash)
        if trouble := self._trouble_with(message, session=session):
            _tell(trouble)
            return [gr.skip()] * (2 + len(self.voices))
        self._answering[session] = threading.Event()
        answered = [turn for turn in turns if len(turn.answers) == len(self.voices)]
        turns = (*answered, Turn(message['text'], tuple(message['files'])))
        return [
            gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True),
            turns,
            *self._windows(turns, said=''),
        ]

    def _trouble_with(self, message: dict[str, Any], *, session: str) -> str | None:
        if session in self._answering:
            return 'an answer is being written; stop it first'
        if message['files'] and not self._takes_images:
            return 'this is a text model; it takes no pictures'
        try:
            check_text(message['text'])
            for file in message['files']:
                read_image_size(ImageRef(path=file))
        except DataError as error:
            told = str(error)
            for file in message['files']:
                told = told.replace(file, Path(file).name)
            return told
        return None if message['text'].strip() else 'write a question, too'

    def answer(
        self, request: 'gr.Request', turns: tuple[Turn, ...], system: str | None, *sampling: Any
    ) -> Iterator[tuple[Any, ...]]:
        """The answers of all voices, one after the other, as they come."""
        session = str(request.session_hash)
        stop = self._answering.get(session)
        nothing = (gr.skip(),) * (1 + len(self.voices))
        if stop is None:  # nothing was taken, a new chat was begun, or the browser has left
            yield nothing
            return
        try:
            for frame in self._frames(turns, system or '', sampling, stop=stop):
                if self._answering.get(session) is not stop:
                    # What was on its way may be drawn after a new chat was cleared: the last word is empty again.
                    yield nothing if session in self._answering else (gr.skip(), *self._windows(()))
                    return
                yield frame
        except Exception as error:  # whatever it is, the page stays, and says so
            _tell(_reason(error))
            yield turns[:-1], *self._windows(turns[:-1])
        finally:
            if self._answering.get(session) is stop:
                del self._answering[session]

    def _frames(
        self, turns: tuple[Turn, ...], system: str, sampling: Sequence[Any], *, stop: threading.Event
    ) -> Iterator[tuple[Any, ...]]:
        settings, seed = read_settings(*sampling)
        for i, voice in enumerate(self.voices):
            conversation, said = to_conversation(turns, voice=i, system=system), ''
            for said in self._speaking.stream(voice, conversation, settings=settings, seed=seed, stop=stop):
                yield gr.skip(), *self._windows(turns, said=said)
            turns = (*turns[:-1], replace(turns[-1], answers=(*turns[-1].answers, said)))
        yield turns, *self._windows(turns)

    def stop(self, request: 'gr.Request') -> None:
        """The button was pressed: what has been said is the answer."""
        if (stop := self._answering.get(str(request.session_hash))) is not None:
            stop.set()

    def leave(self, request: 'gr.Request') -> None:
        """The browser has left, or a new chat begins: nobody waits for the answer."""
        if (stop := self._answering.pop(str(request.session_hash), None)) is not None:
            stop.set()

    def clear(self, request: 'gr.Request') -> list[Any]:
        """A new chat."""
        self.leave(request)
        return [_ready_box(), (), *self._windows(())]

    def pick(self, event: 'gr.SelectData', message: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A picture of the gallery goes with the next message, and its question if nothing is written yet."""
        text = message['text'] or self.examples.pictures[event.index].question
        picked = dict(text=text, files=[*message['files'], self._originals[event.index]])
        return picked, gr.Gallery(selected_index=None)  # so that it can be clicked again

    def stop_all(self) -> None:
        """End all answers; the page closes."""
        for stop in list(self._answering.values()):
            stop.set()

    def _windows(self, turns: Sequence[Turn], *, said: str | None = None) -> list[list[dict[str, Any]]]:
        """What each chat window shows while the one whose turn it is has ``said`` so much."""
        now = len(turns[-1].answers) if turns else 0
        return [
            to_messages(turns, voice=i, saying=None if said is None else said if i == now else '')
            for i in range(len(self.voices))
        ]


# ---- pieces of the page


def _chat_window(name: str, index: int) -> 'gr.Chatbot':
    return gr.Chatbot(
        label=name,
        elem_id=f'chat-{index}',
        height=_CHAT_HEIGHT,
        min_width=300,
        render_markdown=False,
        latex_delimiters=[],
        buttons=[],  # a copy would be of the HTML
        allow_file_downloads=False,
        feedback_options=None,
    )


def _ready() -> dict[str, Any]:
    return dict(submit_btn=True, stop_btn=False)


def _ready_box() -> 'gr.MultimodalTextbox':
    return gr.MultimodalTextbox(**_ready())


def _nothing() -> None:
    """What happens at an event that is sent for its own sake."""


def _fills(text: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Writes a question into the message box, beside the pictures that are there."""
    return lambda message: message | dict(text=text)


# ---- what goes wrong


def _tell(trouble: str) -> None:
    gr.Warning(html.escape(trouble), title='Not answered')


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return 'out of memory; begin a new chat, or show a smaller picture'
    if isinstance(error, UserError):
        return str(error)
    logger.error('an answer failed', exc_info=error)
    return f'the answer failed: {type(error).__name__}: {error}'
