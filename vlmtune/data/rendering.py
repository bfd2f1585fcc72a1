"""From messages to one string, knowing which characters came from whom.

A chat template is a program: where it puts a message can only be learned by running it. It is run once with marks in
place of the texts, which shows where every text lands, and once with the texts, which verifies it. What the marks show
is remembered for conversations of the same roles and parts, so that most conversations need the second run only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vlmtune.data.template_sandbox import BoundedEnvironment
from vlmtune.structures import BoxPart, Conversation, ImagePart, Message, TextPart, user_message
from vlmtune.utils.errors import DataError

_MARK = re.compile('\ue000(\\d+)\ue001')
# Of Python, from inside of a template; many a template takes contents as strings only and meets lists.
_TEMPLATE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
_MOST_FRAMES = 4096  # remembered; real data sets have a few dozen


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
class _Slot:
    """The place of one text. ``header`` and ``end`` are characters around it that are learned with an answer."""

    message: int
    is_answer: bool
    header: int = 0
    end: int = 0


@dataclass(frozen=True)
class _Frame:
    """What a template writes around the texts of a conversation: one literal more than there are slots.

    ``shown`` are the literals with the family's own text in place of the template's image mark.
    """

    literals: tuple[str, ...]
    shown: tuple[str, ...]
    slots: tuple[_Slot, ...]


def _template_messages(messages: Sequence[Message], *, as_parts: bool, marks: bool) -> list[dict[str, Any]]:
    """Messages in the form chat templates take; with ``marks``, texts are replaced by numbered marks."""
    out, number = [], 0
    for message in messages:
        parts: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                parts.append({'type': 'image'})
            elif isinstance(part, BoxPart):
                raise TypeError('a box must be written as text before it is rendered')
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
        image_text: what the template writes for an image and what is rendered in its place; None: the same.
        closes_answers: whether the template ends every answer with a token; False: the last one only.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        as_parts: bool,
        image_text: tuple[str, str] | None = None,
        closes_answers: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.as_parts = as_parts
        self.image_text = image_text
        self.closes_answers = closes_answers
        self._control = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self._first_control = re.compile('|'.join(map(re.escape, self._control)) or r'(?!)')
        self._generation_prompt: str | None = None
        self._named_tokens = dict(tokenizer.special_tokens_map)
        self._frames: dict[Any, _Frame] = {}
        self._environment = BoundedEnvironment()
        self._compiled: tuple[str, Any] = ('', None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_compiled': ('', None)}  # code is not pickled

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> Rendered:
        """Render a whole conversation.

        Raises:
            DataError: the template refuses the messages, hides or rewrites one of them, or ends an answer with nothing.
        """
        messages = conversation.messages
        texts = [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]
        frame = self._frame(messages, add_generation_prompt=add_generation_prompt)
        actual = self._apply(messages, marks=False, add_generation_prompt=add_generation_prompt)
        written = _written(frame, texts, actual)
        if written is None:  # a template may write the time of day: what is remembered may be too old
            self._frames.clear()
            frame = self._frame(messages, add_generation_prompt=add_generation_prompt)
            written = _written(frame, texts, actual)
        if written is None:
            message = 'the chat template rewrites the text of a message, so it cannot be told what to learn; '
            raise DataError(message + 'set prompt_template', kind='unfit_sample')
        return _located(frame, written)

    @property
    def generation_prompt(self) -> str:
        """What the template writes to make the model answer, for example '<|im_start|>assistant\\n'."""
        if self._generation_prompt is None:
            probe = [user_message('x')]
            with_prompt = self._apply(probe, marks=False, add_generation_prompt=True)
            self._generation_prompt = with_prompt.removeprefix(
                self._apply(probe, marks=False, add_generation_prompt=False)
            )
        return self._generation_prompt

    def _apply(self, messages: Sequence[Message], *, marks: bool, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the model has no chat template; set prompt_template, for example 'chatml'", kind='unfit_sample'
            )
        plain = _template_messages(messages, as_parts=self.as_parts, marks=marks)
        try:  # what the tokenizer's apply_chat_template does, without its copies of messages and tools
            template = self._template()
            self._environment.allow(
                sum(len(part.text) for m in messages for part in m.parts if isinstance(part, TextPart))
            )
            rendered = template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._named_tokens,
            )
        except (TemplateError, *_TEMPLATE_ERRORS) as error:
            roles = ', '.join(message.role for message in messages)
            message = f'the chat template refuses the messages ({roles}): {error}'
            raise DataError(message, kind='unfit_sample') from error
        return str(rendered)

    def _template(self) -> Any:
        source = self.tokenizer.get_chat_template()
        if self._compiled[0] != source or self._compiled[1] is None:
            self._compiled = (source, self._environment.compile_bounded(source))
        return self._compiled[1]

    def _frame(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> _Frame:
        """What the template writes around the texts of these messages."""
        shape = tuple((message.role, tuple(map(type, message.parts))) for message in messages)
        key = (str(self.tokenizer.chat_template), add_generation_prompt, shape)
        if key not in self._frames:
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            marked = self._apply(messages, marks=True, add_generation_prompt=add_generation_prompt)
            self._frames[key] = self._framed(marked, messages, need_end=not add_generation_prompt)
        return self._frames[key]

    def _framed(self, marked: str, messages: Sequence[Message], *, need_end: bool) -> _Frame:
        owners = [i for i, m in enumerate(messages) for part in m.parts if isinstance(part, TextPart)]
        order = [int(number) for number in _MARK.findall(marked)]
        if order != list(range(len(owners))):
            lost = sorted(set(range(len(owners))) - set(order))
            what = f'hides a {messages[owners[lost[0]]].role} message' if lost else 'repeats or reorders messages'
            raise DataError(f'the chat template {what}; change the row, or set prompt_template', kind='unfit_sample')
        literals = tuple(_MARK.split(marked)[::2])
        before, after = self.image_text or ('', '')
        # Only what the template wrote is changed: the same characters in a message are text.
        shown = tuple(literal.replace(before, after) for literal in literals) if before else literals
        slots = []
        for i, owner in enumerate(owners):
            if messages[owner].role != 'assistant':
                slots.append(_Slot(owner, is_answer=False))
                continue
            is_last = i + 1 == len(owners) or owners[i + 1] != owner  # of the parts of its message
            closed = need_end and (self.closes_answers or owner == len(messages) - 1)
            end = self._end_of_turn(shown[i + 1], need_end=closed) if is_last else 0
            slots.append(_Slot(owner, is_answer=True, header=self._learned_header(shown[i]), end=end))
        return _Frame(literals, shown, tuple(slots))

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
            "set prompt_template, for example 'vicuna'",
            kind='unfit_sample',
        )


def _written(frame: _Frame, texts: Sequence[str], actual: str) -> list[str] | None:
    """The texts as the template wrote them (many strip the white space); None if it wrote something else."""
    if not actual.startswith(frame.literals[0]):
        return None
    written, at = [], len(frame.literals[0])
    for text, after in zip(texts, frame.literals[1:], strict=True):
        variants = (text, text.strip(), text.lstrip(), text.rstrip())
        found = next((variant for variant in variants if actual.startswith(variant + after, at)), None)
        if found is None:
            return None
        written.append(found)
        at += len(found) + len(after)
    return written if at == len(actual) else None


def _located(frame: _Frame, written: Sequence[str]) -> Rendered:
    contents: list[Span] = []
    answers: dict[int, Span] = {}
    pieces, at = [frame.shown[0]], len(frame.shown[0])
    for slot, text, after in zip(frame.slots, written, frame.shown[1:], strict=True):
        span = Span(at, at + len(text))
        contents.append(span)
        pieces += [text, after]
        at = span.end + len(after)
        if slot.is_answer:
            known = answers.get(slot.message)  # the earlier parts of the same message
            start = span.start - slot.header if known is None else known.start
            answers[slot.message] = Span(start, span.end + slot.end)
    return Rendered(''.join(pieces), tuple(contents), answers)
