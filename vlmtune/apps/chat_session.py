"""The memory of a chat: what was said, and the images that wait for the next message. No model and no terminal here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmtune.data.images import read_image_size
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart
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
    found = []
    for image, question, answer in given:
        example = Example(image, _text(question) or prompt or '', _text(answer))
        if not example.question:
            raise ConfigError("--example with the question '' stands for that of --prompt; give one of the two")
        if not example.answer.strip():
            raise ConfigError('--example has an empty answer; expected what the model should have said')
        found.append(example)
    return tuple(found)


def _text(given: str) -> str:
    if not given.startswith('@'):
        return given
    path = Path(given[1:]).expanduser()
    try:
        return path.read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'--example {given}: no text can be read from {path.absolute()} ({error})') from error


class ChatSession:
    """History of a conversation with images in any turn.

    Args:
        system: message that stands before everything; it survives ``clear``.
        takes_images: whether the model does.
        examples: turns that stand before the first question; they survive ``clear``.

    Raises:
        DataError: an example's image cannot be read, or the model takes none.
    """

    def __init__(
        self, *, system: str | None = None, takes_images: bool = True, examples: Sequence[Example] = ()
    ) -> None:
        self.takes_images = takes_images
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

    def add_image(self, file: str) -> ImageSize:
        """Show an image with the next message; returns its size.

        Raises:
            DataError: there is no such image, or the model takes none. The session is as before.
        """
        if not self.takes_images:
            raise DataError('this is a text model; it takes no images')
        path = Path(file).expanduser()
        if not path.is_file():
            raise DataError(f'no image file at {path.absolute()}')
        image = ImageRef(path=str(path.absolute()))
        size = read_image_size(image)
        self.waiting += (image,)
        return size

    def ask(self, text: str) -> Conversation:
        """The history and a new message with the waiting images. It becomes history once it is answered."""
        first = len(self.history.images)
        images = tuple(ImagePart(first + i) for i in range(len(self.waiting)))
        message = Message('user', (*images, TextPart(text)))
        return Conversation((*self.history.messages, message), (*self.history.images, *self.waiting))

    def record(self, asked: Conversation, answer: str) -> None:
        """Remember what was asked and the answer."""
        self.history = Conversation((*asked.messages, Message('assistant', (TextPart(answer),))), asked.images)
        self.waiting = ()
