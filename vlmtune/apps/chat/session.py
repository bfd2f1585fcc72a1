"""The memory of a chat: what was said, and the images that wait for the next message. No model and no terminal here."""

import base64
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlmtune.data.image_refs import shorten, to_image_ref
from vlmtune.data.images import is_url, load_image
from vlmtune.structures import BoxPart, Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart, user_message
from vlmtune.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class Example:
    """A question with its answer, shown to the model before the conversation begins; ``image`` is a file or ''."""

    image: str
    question: str
    answer: str


def read_examples(given: Sequence[Sequence[str]], *, prompt: str | None) -> tuple[Example, ...]:
    """Examples as the command line has them: image, question and answer.

    Args:
        given: a question or answer ``@FILE`` is the text in that file; an empty question is ``prompt``.
        prompt: the question that will be asked; None in a conversation.

    Raises:
        DataError: such a file cannot be read.
        ConfigError: an answer is empty, or a question is, and there is no prompt.
    """
    read, found = partial(text_or_file, option='--example'), []
    for image, question, answer in given:
        example = Example(image, read(question) or prompt or '', read(answer))
        if not example.question:
            raise ConfigError("--example with the question '' stands for that of --prompt; give one of the two")
        if not example.answer.strip():
            raise ConfigError('--example has an empty answer; expected what the model should have said')
        found.append(example)
    return tuple(found)


def text_or_file(given: str, *, option: str) -> str:
    """A text, or what stands in the file of ``@FILE``.

    Raises:
        DataError: the file cannot be read.
    """
    if not given.startswith('@'):
        return given
    path = Path(given[1:]).expanduser()
    try:
        return path.read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{option} {given}: no text can be read from {path.absolute()} ({error})') from error


def check_text(text: str) -> None:
    """Raises DataError where a text holds half a character, as Python reads bytes of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'the text is not UTF-8 from its character {error.start + 1} on; write it anew') from error


class ChatSession:
    """History of a conversation with images in any turn.

    Args:
        system: message that stands before everything; it survives ``clear``.
        takes_images: whether the model does.
        examples: turns that stand before the first question; they survive ``clear``.

    Raises:
        DataError: an example's image cannot be read, or the model takes none; a text holds what is no character.
    """

    def __init__(
        self, *, system: str | None = None, takes_images: bool = True, examples: Sequence[Example] = ()
    ) -> None:
        check_text(system or '')
        self.takes_images = takes_images
        self._written: set[Path] = set()
        self._start = Conversation((Message('system', (TextPart(system),)),) if system else ())
        self.clear()
        for example in examples:
            if example.image:
                self.add_image(example.image)
            self.record(self.ask(example.question), example.answer)
        self._start = self.history

    def clear(self) -> None:
        """Forget everything that was said and shown."""
        self.history = self._start
        self.waiting: tuple[ImageRef, ...] = ()

    def add_image(self, image: Any) -> ImageSize:
        """Show an image with the next message; returns its size.

        Args:
            image: a file, or anything else that ``to_image_ref`` takes: a PIL image, the bytes of an image file, a
                data URI, base64 text.

        Raises:
            DataError: there is no such image, or the model takes none. The session is as before.
        """
        if not self.takes_images:
            raise DataError('this is a text model; it takes no images')
        found = to_image_ref(image)
        if found.path is not None:
            if is_url(found.path):
                raise DataError(f'image is a URL ({shorten(found.path)}); download it first and give its path')
            path = _place_of(found.path)
            if not path.is_file():
                raise DataError(f'no image file at {path}')
            found = ImageRef(path=str(path))
        pixels = load_image(found)  # whole, since a broken one would be in the way of every later message
        self.waiting += (found,)
        return ImageSize(height=pixels.height, width=pixels.width)

    def ask(self, text: str) -> Conversation:
        """The history and a new message with the waiting images. It becomes history once it is answered.

        Raises:
            DataError: the text holds what is no character.
        """
        check_text(text)
        images = (*self.history.images, *self.waiting)
        asked = user_message(text, images=range(len(self.history.images), len(images)))
        return Conversation((*self.history.messages, asked), images)

    def record(self, asked: Conversation, answer: str) -> None:
        """Remember what was asked and the answer."""
        self.history = Conversation((*asked.messages, Message('assistant', (TextPart(answer),))), asked.images)
        self.waiting = ()

    def save(self, file: str) -> Path:
        """Write the conversation as a row of training data, which ``openai_map_fn`` reads; returns the file.

        Raises:
            DataError: nothing was said, the file exists and was not written by this session, or cannot be written.
        """
        path = _place_of(file)
        if not self.history.messages:
            raise DataError('there is nothing to save yet')
        if path.exists() and path not in self._written:
            raise DataError(f'{path} exists; nothing was written, name another file')
        try:
            path.write_text(json.dumps(_as_row(self.history), ensure_ascii=False) + '\n', 'utf-8')
        except OSError as error:
            raise DataError(f'{path} cannot be written ({error.strerror or error})') from error
        self._written.add(path)
        return path


def _place_of(file: str) -> Path:
    """Where a file is, or would be.

    Raises:
        DataError: none can be there, or nobody may look.
    """
    try:
        path = Path(file).expanduser().absolute()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f'{shorten(file)}: no such file can be used ({getattr(error, "strerror", error)})') from error
    return path


def _as_row(conversation: Conversation) -> dict[str, Any]:
    return dict(
        messages=[
            dict(role=message.role, content=[_as_part(part) for part in message.parts if not isinstance(part, BoxPart)])
            for message in conversation.messages
        ],
        images=[
            image.path if image.data is None else base64.b64encode(image.data).decode() for image in conversation.images
        ],
    )


def _as_part(part: TextPart | ImagePart) -> dict[str, Any]:
    return dict(type='image', index=part.index) if isinstance(part, ImagePart) else dict(type='text', text=part.text)
