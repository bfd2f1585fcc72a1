"""What was said in a browser: questions with pictures, and the answers of one voice or two. Knows no Gradio."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.structures import Conversation, ImageRef, Message, TextPart, user_message

NO_ANSWER = '(no answer)'


@dataclass(frozen=True)
class Turn:
    """A question and what was answered.

    Attributes:
        text: of the question.
        images: files that are shown with it.
        answers: one per voice; fewer as long as somebody has still to answer.
    """

    text: str
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


def to_conversation(turns: Sequence[Turn], *, voice: int, system: str = '') -> Conversation:
    """The turns as one voice knows them; the last is the question.

    Earlier turns that this voice answered with nothing are left out: chat templates know no empty answers.
    """
    messages = [Message('system', (TextPart(system),))] if system.strip() else []
    images: list[ImageRef] = []
    for turn in turns:
        answer = turn.answers[voice] if len(turn.answers) > voice else None
        if answer == '':
            continue
        messages.append(user_message(turn.text, images=range(len(images), len(images) + len(turn.images))))
        images += [ImageRef(path=path) for path in turn.images]
        if answer is not None:
            messages.append(Message('assistant', (TextPart(answer),)))
    return Conversation(tuple(messages), tuple(images))


def to_messages(turns: Sequence[Turn], *, voice: int, saying: str | None = None) -> list[dict[str, Any]]:
    """The turns as a chat window shows them: texts letter by letter, as HTML that can do and fetch nothing.

    Args:
        turns: so far.
        voice: whose answers are shown.
        saying: what it has said of an answer that is still to be ended.
    """
    return [message for turn in turns for message in _messages_of(turn, voice=voice, saying=saying)]


def _messages_of(turn: Turn, *, voice: int, saying: str | None) -> Iterator[dict[str, Any]]:
    for path in turn.images:
        yield dict(role='user', content=dict(path=path, alt_text='picture'))
    yield dict(role='user', content=_as_text(turn.text))
    if len(turn.answers) > voice:
        yield dict(role='assistant', content=_as_text(turn.answers[voice] or NO_ANSWER))
    elif saying is not None:
        yield dict(role='assistant', content=_as_text(saying or '…'))


def _as_text(text: str) -> dict[str, str]:
    return dict(type='text', text=html.escape(text))
