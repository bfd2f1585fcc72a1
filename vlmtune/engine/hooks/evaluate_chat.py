"""Sample answers, before, while and after training."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook

from vlmtune.data.images import load_image, read_image_size
from vlmtune.engine import ranks
from vlmtune.engine.optim import unwrap
from vlmtune.engine.state import rng_state, set_rng_state
from vlmtune.evaluation import generate
from vlmtune.registry import HOOKS
from vlmtune.structures import Conversation, ImagePart, ImageRef, Message, Part, TextPart
from vlmtune.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

RECORDS_FILE = 'evaluate_chat.jsonl'


@HOOKS.register_module()
class EvaluateChatHook(Hook):
    """Asks the model fixed questions and logs the answers as text, JSONL and, with a tracker, pictures.

    The model's mode, the random generators and the gradients are left as they were.

    Args:
        inputs: the questions.
        images: None, or one entry per question: a path, a list of paths, or None for a question without a picture. A
            single path goes with every question.
        system: system message of all questions.
        every_n_iters: optimizer steps between evaluations; None asks before and after training only.
        max_new_tokens: of an answer.
        generation: further settings of transformers' ``generate``, for example ``dict(do_sample=True, top_p=0.9)``.

    Raises:
        ConfigError: images and inputs differ in number, or an image cannot be read.
    """

    priority = 'LOW'

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        images: Sequence[str | Sequence[str] | None] | str | None = None,
        system: str | None = None,
        every_n_iters: int | None = None,
        max_new_tokens: int = 128,
        generation: dict[str, Any] | None = None,
    ) -> None:
        self.inputs = [inputs] if isinstance(inputs, str) else list(inputs)
        images = [images] * len(self.inputs) if images is None or isinstance(images, str) else list(images)
        if len(images) != len(self.inputs):
            raise ConfigError(
                f'evaluation_images has {len(images)} entries, evaluation_inputs {len(self.inputs)}; give one each'
            )
        self.conversations = [_conversation(q, i, system) for q, i in zip(self.inputs, images, strict=True)]
        self._check_images()
        self.every_n_iters = every_n_iters
        self.generation = dict(generation or {}, max_new_tokens=max_new_tokens)

    def _check_images(self) -> None:
        for i, conversation in enumerate(self.conversations):
            for image in conversation.images:
                try:
                    read_image_size(image, root=None)
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
        before, model = rng_state(), unwrap(runner.model)
        settings = dict(self.generation, synced_gpus=True) if synced else self.generation
        answers = generate(model.model, runner.processor, self.conversations, autocast_dtype=model.dtype, **settings)
        set_rng_state(before)
        return answers

    def _record(self, runner: Any, iteration: int, answers: list[str]) -> None:
        with Path(runner.work_dir, RECORDS_FILE).open('a', encoding='utf-8') as file:
            for i, (conversation, answer) in enumerate(zip(self.conversations, answers, strict=True)):
                images = [str(image) for image in conversation.images]
                shown = f' {images}' if images else ''
                logger.info(
                    'sample answer at iteration %d%s\n  asked: %s\n  answer: %s',
                    iteration,
                    shown,
                    self.inputs[i],
                    answer,
                )
                row = dict(iteration=iteration, input=self.inputs[i], images=images, answer=answer)
                file.write(json.dumps(row, ensure_ascii=False) + '\n')
                for image in conversation.images:
                    pixels = np.asarray(load_image(image, root=None))
                    runner.visualizer.add_image(f'evaluate_chat/{i}', pixels, step=iteration)


def _conversation(question: str, images: str | Sequence[str] | None, system: str | None) -> Conversation:
    paths = [] if images is None else [images] if isinstance(images, str) else list(images)
    parts: list[Part] = [ImagePart(i) for i in range(len(paths))]
    messages = [Message('system', (TextPart(system),))] if system else []
    messages.append(Message('user', (*parts, TextPart(question))))
    return Conversation(tuple(messages), tuple(ImageRef(path=path) for path in paths))
