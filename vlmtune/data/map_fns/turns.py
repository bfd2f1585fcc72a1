"""From turns with their images in place to a checked Conversation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from vlmtune.structures import BoxPart, Conversation, ImagePart, ImageRef, Message, Part, Role, TextPart
from vlmtune.utils.errors import DataError

_UNANSWERED = ContextVar('rows may end with a question', default=False)


@contextmanager
def questions_allowed() -> Iterator[None]:
    """Inside, a row may end with a question: it is to be asked, not learned."""
    token = _UNANSWERED.set(True)
    try:
        yield
    finally:
        _UNANSWERED.reset(token)


@dataclass(frozen=True)
class Turn:
    """One message, images and boxes in place; ``where`` is what errors call it, for example ``conversations[2]``."""

    role: Role
    pieces: Sequence[str | ImageRef | BoxPart]
    where: str
    loss: bool | None = None


def parse_role(value: object, roles: Mapping[str, Role], *, where: str) -> Role:
    """The role that a format's own word stands for.

    Raises:
        DataError: the format has no such word.
    """
    if isinstance(value, str) and value in roles:
        return roles[value]
    raise DataError(f'{where} is {value!r}; expected one of {", ".join(roles)}')


def build_conversation(turns: Sequence[Turn], *, alternate: bool = True) -> Conversation:
    """Number the images as they appear, and check the whole.

    Args:
        turns: at least one; a system turn may only come first.
        alternate: user and assistant must take turns, the user first; otherwise any order goes.

    Raises:
        DataError: an empty turn, an image in a system turn, no answer, nothing after the last question, turns out of
            order, or no turn that may be learned. Within ``questions_allowed``, a row may end with a question.
    """
    for turn in turns:
        _check_turn(turn)
    if alternate:
        _check_order(turns)
    if _UNANSWERED.get() and turns[-1].role == 'user':
        return _number_images(turns)
    answers = [turn for turn in turns if turn.role == 'assistant']
    if not answers:
        raise DataError('has no answer of the assistant; expected at least one')
    if turns[-1].role != 'assistant':
        raise DataError(
            f'{turns[-1].where} is the last message and from the {turns[-1].role}; expected an answer of the assistant'
        )
    if all(turn.loss is False for turn in answers):
        raise DataError('switches the loss off for every answer of the assistant; expected at least one to learn')
    return _number_images(turns)


def _check_turn(turn: Turn) -> None:
    text = ''.join(piece for piece in turn.pieces if isinstance(piece, str))
    images = sum(isinstance(piece, ImageRef) for piece in turn.pieces)
    boxes = sum(isinstance(piece, BoxPart) for piece in turn.pieces)
    if not text.strip() and not boxes and (not images or turn.role == 'assistant'):
        kind = 'empty_answer' if turn.role == 'assistant' else 'wrong_row'
        raise DataError(f'{turn.where} ({turn.role}) is empty; expected text', kind=kind)
    if images and turn.role == 'system':
        raise DataError(f'{turn.where} puts an image into a system message; expected it in a user message')
    if turn.loss is True and turn.role != 'assistant':
        raise DataError(f'{turn.where} ({turn.role}) asks for loss; only messages of the assistant can be learned')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'{turn.where} ({turn.role}) holds half a character (a lone surrogate) at {error.start}; fix the text'
        ) from error


def _check_order(turns: Sequence[Turn]) -> None:
    spoken = list(turns[1:] if turns[0].role == 'system' else turns)
    expected: Role = 'user'
    for turn in spoken:
        if turn.role == 'system':
            raise DataError(f'{turn.where} is a system message; expected it first or not at all')
        if turn.role != expected:
            raise DataError(
                f'{turn.where} is from the {turn.role}; expected user and assistant in turn, the user first'
            )
        expected = 'assistant' if expected == 'user' else 'user'


def _number_images(turns: Sequence[Turn]) -> Conversation:
    images: list[ImageRef] = []
    messages = []
    for turn in turns:
        parts: list[Part] = []
        for piece in turn.pieces:
            if isinstance(piece, ImageRef):
                parts.append(ImagePart(len(images)))
                images.append(piece)
            elif isinstance(piece, BoxPart):
                parts.append(piece)
            elif piece:
                parts.append(TextPart(piece))
        messages.append(Message(turn.role, tuple(parts), turn.loss if turn.role == 'assistant' else None))
    return Conversation(tuple(messages), tuple(images))
