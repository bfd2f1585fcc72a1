"""The four states of a training example: row -> Conversation -> Sample -> Batch.

A *row* is a plain dict in any supported format. A *Conversation* is messages plus references to images. A *Sample* is
tokens, labels and the same references; its length is final, image tokens included, though no pixel was decoded. A
*Batch* is a dict of tensors, ready for ``SupervisedFinetune.forward``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

IGNORE_INDEX = -100
"""The label of a position that is not learned."""

Role: TypeAlias = Literal['system', 'user', 'assistant']

BoxConvention: TypeAlias = Literal['pixel', 'unit', 'thousand']
"""What the numbers of a box count: pixels of the upright image, or shares of its width and height, of 1 or of 1000."""
BOX_CONVENTIONS: tuple[str, ...] = get_args(BoxConvention)


@dataclass(frozen=True)
class ImageRef:
    """Where one image lies: a path (absolute, or relative to the image folder), or the bytes of an image file.

    Raises:
        ValueError: both or none of the two are given.
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError('an ImageRef holds either a path or bytes')

    def __str__(self) -> str:
        return self.path if self.path is not None else f'<{len(self.data or b"")} bytes>'


class ImageSize(NamedTuple):
    """Pixels, after EXIF orientation."""

    height: int
    width: int


@dataclass(frozen=True)
class TextPart:
    """A piece of text inside a message. It is always plain text: control tokens in it are not control tokens."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """The place of an image inside a message."""

    index: int  # into Conversation.images


@dataclass(frozen=True)
class BoxPart:
    """A rectangle on an image, inside a message. ``Processor.tokenize`` writes it in the convention of the model.

    ``box`` is (left, top, right, bottom) on the upright image, as ``convention`` counts. Pixels become shares when the
    size of the image is known.
    """

    image: int  # into Conversation.images
    box: tuple[float, float, float, float]
    convention: BoxConvention


Part: TypeAlias = TextPart | ImagePart | BoxPart


@dataclass(frozen=True)
class Message:
    """One turn.

    ``loss`` overrides the rule of the data set for this message: True learns it, False does not, None follows the
    rule. Only assistant messages can be learned.
    """

    role: Role
    parts: tuple[Part, ...]
    loss: bool | None = None

    @property
    def text(self) -> str:
        """The text parts, joined; images and boxes are not in it."""
        return ''.join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def image_indices(self) -> tuple[int, ...]:
        """The images shown in this message, in order."""
        return tuple(part.index for part in self.parts if isinstance(part, ImagePart))


def user_message(text: str, *, images: Iterable[int] = ()) -> Message:
    """A question: the images of these indices, then the text."""
    return Message('user', (*map(ImagePart, images), TextPart(text)))


@dataclass(frozen=True)
class Conversation:
    """Messages and the images they show, in one family-independent form.

    The images of the parts, read in order, must be exactly 0, 1, 2, ... len(images) - 1.
    """

    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()

    def shown_images(self) -> Iterator[int]:
        """Indices of the images in the order in which the messages show them."""
        for message in self.messages:
            yield from message.image_indices


@dataclass(frozen=True)
class Sample:
    """One tokenised training example.

    ``input_ids`` and ``labels`` are int32[L]; placeholders of images are already expanded, so L is the true length.
    ``labels`` holds the token itself where it is learned and IGNORE_INDEX elsewhere (not shifted). ``patches`` is what
    the vision encoder has to read: patches of all images, before any merging.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageRef, ...] = ()
    image_sizes: tuple[ImageSize, ...] = ()
    patches: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class SampleKey(NamedTuple):
    """What a sampler asks a data set for.

    A key with ``supervised=False`` is a filler that gives every rank the same number of micro-batches: its labels are
    all IGNORE_INDEX, so it weighs nothing.
    """

    epoch: int
    sample: int
    supervised: bool = True
