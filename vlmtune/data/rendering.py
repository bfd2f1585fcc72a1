"""From messages to one string, knowing which characters came from whom.

A chat template is a program: where it puts a message can only be learned by running it. It is run once with marks in
place of the texts, which shows where every text lands, and once with the texts, which verifies it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vlmtune.structures import Conversation, ImagePart, Message, TextPart
from vlmtune.utils.errors import DataError

_MARK = re.compile('\ue000(\\d+)\ue001')


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered text."""

    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    ``contents`` are the spans that hold texts of messages (nothing in them is a control token). ``answers`` maps the
    index of an assistant message to the span that the model has to produce: from the end of the generation prompt to
    the end of the token that closes the turn.
    """

    text: str
    contents: tuple[Span, ...]
    answers: dict[int, Span]


@dataclass(frozen=True)
class _Piece:
    """Literal text of the template (``message`` is None) or the text of one message part."""

    text: str
    message: int | None = None


def _template_messages(messages: Sequence[Message], *, as_parts: bool, marks: bool) -> list[dict[str, Any]]:
    """Messages in the form chat templates take; with ``marks``, texts are replaced by numbered marks."""
    out, number = [], 0
    for message in messages:
        parts: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                parts.append({'type': 'image'})
            else:
                parts.append({'type': 'text', 'text': f'\ue000{number}\ue001' if marks else part.text})
                number += 1
        content = parts if as_parts else ''.join(part['text'] for part in parts)
        out.append({'role': message.role, 'content': content})
    return out


class ChatRenderer:
    """Runs a tokenizer's chat template.

    Args:
        tokenizer: carries the chat template.
        as_parts: whether the template takes contents as lists of parts (all image families do).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, as_parts: bool) -> None:
        self.tokenizer = tokenizer
        self.as_parts = as_parts
        self._control = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self._first_control = re.compile('|'.join(map(re.escape, self._control)) or r'(?!)')
        self._generation_prompt: str | None = None

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """Render a whole conversation.

        Raises:
            DataError: the template refuses the messages, hides or rewrites one of them, or ends an answer with nothing.
        """
        messages = conversation.messages
        texts = [
            (i, part.text) for i, message in enumerate(messages) for part in message.parts if isinstance(part, TextPart)
        ]
        marked = self._apply(messages, marks=True, add_generation_prompt=add_generation_prompt)
        actual = self._apply(messages, marks=False, add_generation_prompt=add_generation_prompt)
        order = [int(number) for number in _MARK.findall(marked)]
        if order != list(range(len(texts))):
            lost = sorted(set(range(len(texts))) - set(order))
            what = f'hides a {messages[texts[lost[0]][0]].role} message' if lost else 'repeats or reorders messages'
            raise DataError(f'the chat template {what}; change the row, or set prompt_template')
        pieces = self._pieces(marked, texts, actual)
        if ''.join(piece.text for piece in pieces) == actual:
            return self._locate(pieces, actual, need_end=not add_generation_prompt, messages=messages)
        raise DataError(
            'the chat template rewrites the text of a message, so it cannot be told what to learn; set prompt_template'
        )

    @property
    def generation_prompt(self) -> str:
        """What the template writes to make the model answer, for example '<|im_start|>assistant\\n'."""
        if self._generation_prompt is None:
            probe = [Message('user', (TextPart('x'),))]
            with_prompt = self._apply(probe, marks=False, add_generation_prompt=True)
            self._generation_prompt = with_prompt.removeprefix(
                self._apply(probe, marks=False, add_generation_prompt=False)
            )
        return self._generation_prompt

    def _apply(self, messages: Sequence[Message], *, marks: bool, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError("the model has no chat template; set prompt_template, for example 'chatml'")
        plain = _template_messages(messages, as_parts=self.as_parts, marks=marks)
        try:
            rendered = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:  # TypeError: a template that takes contents as strings only
            roles = ', '.join(message.role for message in messages)
            raise DataError(f'the chat template refuses the messages ({roles}): {error}') from error
        return str(rendered)

    @staticmethod
    def _pieces(marked: str, texts: list[tuple[int, str]], actual: str) -> list[_Piece]:
        """What the template wrote around every text, and the text as it wrote it: many strip the white space."""
        around = _MARK.split(marked)[::2]
        pieces, at = [_Piece(around[0])], len(around[0])
        for (message, text), after in zip(texts, around[1:], strict=True):
            variants = (text, text.strip(), text.lstrip(), text.rstrip())
            text = next((variant for variant in variants if actual.startswith(variant + after, at)), text)
            pieces += [_Piece(text, message), _Piece(after)]
            at += len(text) + len(after)
        return pieces

    def _locate(self, pieces: list[_Piece], text: str, *, need_end: bool, messages: Sequence[Message]) -> Rendered:
        contents: list[Span] = []
        answers: dict[int, Span] = {}
        at = 0
        for i, piece in enumerate(pieces):
            span = Span(at, at := at + len(piece.text))
            if piece.message is None:
                continue
            contents.append(span)
            if messages[piece.message].role != 'assistant':
                continue
            before, after = pieces[i - 1].text, pieces[i + 1].text
            last_of_message = i + 2 >= len(pieces) or pieces[i + 2].message != piece.message
            end = self._end_of_turn(after, need_end=need_end) if last_of_message else 0
            if piece.message in answers:  # a further part of the same message
                answers[piece.message] = Span(answers[piece.message].start, span.end + end)
            else:
                answers[piece.message] = Span(span.start - self._learned_header(before), span.end + end)
        return Rendered(text, tuple(contents), answers)

    def _learned_header(self, before: str) -> int:
        """Characters between the generation prompt and the text: the model has to write those itself."""
        prompt = self.generation_prompt
        at = before.rfind(prompt) if prompt else -1
        return 0 if at < 0 else len(before) - at - len(prompt)

    def _end_of_turn(self, after: str, *, need_end: bool) -> int:
        """Characters from the end of an answer through the control token that closes it."""
        match = self._first_control.search(after)
        if match and not after[: match.start()].strip():
            return match.end()
        if not need_end:
            return 0
        raise DataError(
            'the chat template writes no control token after an answer, so a model could never learn to stop; '
            "set prompt_template, for example 'vicuna'"
        )
