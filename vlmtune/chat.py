"""Talk with a model from Python.

>>> from vlmtune.chat import Chat
>>> chat = Chat('quickstart/base')
>>> chat.ask('Is there a red shape?', images=['picture.png'])
'yes'
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from vlmtune.apps.chat.answering import Answerer, generation_settings, load_answerer
from vlmtune.apps.chat.session import ChatSession, Example
from vlmtune.structures import Conversation
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.suggest import did_you_mean

__all__ = ['Chat']

_DEFAULTS: dict[str, Any] = dict(max_new_tokens=512, temperature=0.0, top_p=None, top_k=None)


class Chat:
    """A conversation with a model, images in any turn.

    An image is a file name, a PIL image, the bytes of an image file, its base64 text, or a data URI.

    Args:
        model: a folder or a hub id; the folder of an adapter means its base and the adapter; or the parts of a LLaVA,
            see docs/llava.md.
        adapter: a PEFT adapter on top of it.
        system: system message.
        examples: (image or None, question, answer) of each turn that is shown before (few-shot).
        prompt_template: a name in ``vlmtune.data.templates``, for models without a chat template.
        bits: 4 or 8 loads the language model quantised.
        offload_folder: weights that fit neither the device nor the memory go into files there.
        seed: makes sampled answers repeatable.
        settings: max_new_tokens (512), temperature (0: greedy), top_p, top_k, repetition_penalty and stop_words of the
            answers.

    Raises:
        UserError: the model cannot be loaded, an image of an example cannot be read, or a setting is unknown or out of
            range.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        *,
        adapter: str | None = None,
        system: str | None = None,
        examples: Iterable[Sequence[Any]] = (),
        prompt_template: str | None = None,
        bits: int | None = None,
        offload_folder: str | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        self._settings = {**_DEFAULTS, **settings}
        _checked(self._settings)  # a mistake is told before the model is loaded
        self.answerer: Answerer = load_answerer(
            model, adapter=adapter, bits=bits, prompt_template=prompt_template, offload_folder=offload_folder
        )
        self.session = ChatSession(
            system=system,
            takes_images=self.answerer.processor.family.has_vision,
            examples=[Example(*example) for example in examples],
        )
        if seed is not None:
            torch.manual_seed(seed)

    @property
    def history(self) -> Conversation:
        """What was said so far."""
        return self.session.history

    def ask(
        self,
        text: str,
        images: Any = None,
        *,
        write: Callable[[str], None] = lambda _: None,
        should_stop: Callable[[], bool] | None = None,
        **settings: Any,
    ) -> str:
        """Ask, and remember question and answer.

        Args:
            text: the question.
            images: one or a list of them, shown with it; None: none.
            write: gets the pieces of the answer as they come.
            should_stop: asked after every token; True ends the answer.
            settings: of this answer, over those of the chat.

        Raises:
            UserError: an image cannot be read, a setting is unknown or out of range, or the conversation does not fit
                the model. The chat is as before.
        """
        chosen = _checked({**self._settings, **settings})
        shown = images if isinstance(images, list | tuple) else () if images is None else (images,)
        before = self.session.waiting
        try:
            for image in shown:
                self.session.add_image(image)
            asked = self.session.ask(text)
            answer = self.answerer.answer(asked, write, settings=chosen, should_stop=should_stop)
        except BaseException:
            self.session.waiting = before
            raise
        self.session.record(asked, answer)
        return answer

    def clear(self) -> None:
        """Forget everything but system message and examples."""
        self.session.clear()

    def save(self, file: str) -> None:
        """Write the conversation as a row of training data, see ``ChatSession.save``."""
        self.session.save(file)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``generate`` takes."""
    known = inspect.signature(generation_settings).parameters
    for name in settings:
        if name not in known:
            raise ConfigError(f'{name}: no setting of a chat{did_you_mean(name, known)}; there are {", ".join(known)}')
    return generation_settings(**settings)
