"""Sample answers, before, while and after training."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook

from vlmtune.data.images import load_image
from vlmtune.engine import ranks
from vlmtune.engine.optim import unwrap
from vlmtune.engine.run_layout import CHAT_FILE
from vlmtune.engine.state import kept_rng
from vlmtune.engine.trackers import Trackers
from vlmtune.evaluation import generate
from vlmtune.evaluation.generation import check_generation
from vlmtune.evaluation.stopping import as_stop_strings
from vlmtune.registry import HOOKS
from vlmtune.structures import Conversation, ImageRef, Message, TextPart, user_message
from vlmtune.utils.errors import ConfigError, DataError
from vlmtune.utils.json_lines import append_lines

logger = logging.getLogger(__name__)

_SHOWN = 512  # pixels of the longer edge, at most: trackers keep every picture of every evaluation


@HOOKS.register_module()
class EvaluateChatHook(Hook):
    """Asks the model fixed questions and logs the answers as text, JSONL and, with trackers, beside their pictures.

    The model's mode, the random generators and the gradients are left as they were.

    Args:
        inputs: the questions.
        images: None, or one entry per question: a path, a list of paths, or None for a question without a picture. A
            single path goes with every question.
        system: system message of all questions, or a list with one for each; None for none.
        every_n_iters: optimizer steps between evaluations; None asks before and after training only.
        max_new_tokens: of an answer.
        stop_words: texts that end an answer, which is cut before them.
        generation: further settings of transformers' ``generate``, for example ``dict(do_sample=True, top_p=0.9)``.

    Raises:
        ConfigError: images or system messages and inputs differ in number, an image cannot be read, or ``generate``
            knows no such setting.
    """

    priority = 'LOW'

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        images: Sequence[str | Sequence[str] | None] | str | None = None,
        system: Sequence[str | None] | str | None = None,
        every_n_iters: int | None = None,
        max_new_tokens: int = 128,
        stop_words: Sequence[str] | str = (),
        generation: dict[str, Any] | None = None,
    ) -> None:
        self.inputs = [inputs] if isinstance(inputs, str) else list(inputs)
        own_images = self._for_each(images, name='evaluation_images')
        own_system = self._for_each(system, name='SYSTEM')
        self.conversations = [_conversation(*asked) for asked in zip(self.inputs, own_images, own_system, strict=True)]
        self._check_images()
        self.every_n_iters = every_n_iters
        self.generation = dict(generation or {}, max_new_tokens=max_new_tokens)
        check_generation(self.generation, where='EvaluateChatHook.generation')
        self.stop_words = as_stop_strings(stop_words, name='EvaluateChatHook.stop_words')

    def _for_each(self, given: Any, *, name: str) -> list[Any]:
        entries = [given] * len(self.inputs) if given is None or isinstance(given, str) else list(given)
        if len(entries) != len(self.inputs):
            raise ConfigError(f'{name} has {len(entries)} entries, evaluation_inputs {len(self.inputs)}; give one each')
        return entries

    def _check_images(self) -> None:
        for i, conversation in enumerate(self.conversations):
            for image in conversation.images:
                try:
                    load_image(image, root=None)
                except DataError as error:
                    found = str(error) if Path(str(image)).exists() else f'no file at {Path(str(image)).absolute()}'
                    raise ConfigError(f'evaluation_images[{i}]: {found}') from error

    def before_train(self, runner: Any) -> None:
        """Ask the model as it is."""
        self._evaluate(runner, runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Ask on the way; the last step is left to ``after_train``."""
        done = runner.iter + 1
        if self.every_n_iters and self.every_n_iters > 0 and done % self.every_n_iters == 0 and done < runner.max_iters:
            self._evaluate(runner, done)

    def after_train(self, runner: Any) -> None:
        """Ask the trained model."""
        self._evaluate(runner, runner.iter)

    def _evaluate(self, runner: Any, iteration: int) -> None:
        if not self.conversations:
            return
        everywhere = runner.strategy.shards_weights
        if everywhere:  # a rank that cannot read one would leave the others waiting in the middle of a layer
            with ranks.together('reading the evaluation images'):
                self._check_images()
        with ranks.together('making sample answers'):
            answers = self._answers(runner, synced=everywhere) if runner.rank == 0 or everywhere else []
            if runner.rank == 0:
                self._record(runner, iteration, answers)

    def _answers(self, runner: Any, *, synced: bool) -> list[str]:
        """Made from the model as it is; ``synced``: by all ranks together, because each holds a piece of every weight.

        No rank stops before the last one does: where they sample, each draws an answer of its own.
        """
        model = unwrap(runner.model)
        settings = dict(self.generation, stop_strings=self.stop_words) | (dict(synced_gpus=True) if synced else {})
        with kept_rng():
            return generate(model.model, runner.processor, self.conversations, autocast_dtype=model.dtype, **settings)

    def _record(self, runner: Any, iteration: int, answers: list[str]) -> None:
        for i, (conversation, answer) in enumerate(zip(self.conversations, answers, strict=True)):
            images = [str(image) for image in conversation.images]
            where, asked = f' {images}' if images else '', self.inputs[i]
            logger.info('sample answer at iteration %d%s\n  asked: %s\n  answer: %s', iteration, where, asked, answer)
            row = dict(iteration=iteration, input=asked, images=images, answer=answer)
            append_lines(Path(runner.work_dir, CHAT_FILE), [row])
            self._show(runner.visualizer, i, f'asked: {asked}\n\nanswer: {answer}', iteration)

    def _show(self, visualizer: Any, i: int, text: str, iteration: int) -> None:
        """Text and pictures for trackers, under the same name; a visualizer of mmengine's takes pictures only."""
        name, images = f'evaluate_chat/{i}', self.conversations[i].images
        captioned = isinstance(visualizer, Trackers)
        if captioned:
            visualizer.add_text(name, text, step=iteration)
        for k, image in enumerate(images):
            picture = load_image(image, root=None).convert('RGB')
            picture.thumbnail((_SHOWN, _SHOWN))
            own = name if len(images) == 1 else f'{name}/{k}'
            visualizer.add_image(own, np.asarray(picture), step=iteration, **(dict(caption=text) if captioned else {}))


def _conversation(question: str, images: str | Sequence[str] | None, system: str | None) -> Conversation:
    paths = [] if images is None else [images] if isinstance(images, str) else list(images)
    start = (Message('system', (TextPart(system),)),) if system else ()
    asked = user_message(question, images=range(len(paths)))
    return Conversation((*start, asked), tuple(ImageRef(path=path) for path in paths))
