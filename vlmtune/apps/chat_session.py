"""The memory of a chat: what was said, and the images that wait for the next message. No model and no terminal here."""

from pathlib import Path

from vlmtune.data.images import read_image_size
from vlmtune.structures import Conversation, ImagePart, ImageRef, ImageSize, Message, TextPart
from vlmtune.utils.errors import DataError


class ChatSession:
    """History of a conversation with images in any turn.

    Args:
        system: message that stands before everything; it survives ``clear``.
        takes_images: whether the model does.
    """

    def __init__(self, *, system: str | None = None, takes_images: bool = True) -> None:
        self.takes_images = takes_images
        self._start = Conversation((Message('system', (TextPart(system),)),) if system else ())
        self.clear()

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
