"""Which questions are asked together, by whom, and how a run of them is known again."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.data import Processor
from vlmtune.data.planning import file_state
from vlmtune.evaluation.questions import Question
from vlmtune.structures import ImageRef


def fingerprint(
    questions: Sequence[Question], *, processor: Processor, settings: Mapping[str, Any], model_key: str
) -> str:
    """A digest of all that answers depend on, but for the batch size."""
    images = processor.image_processor.to_dict() if processor.image_processor is not None else {}
    digest = hashlib.sha256(repr((model_key, sorted(settings.items()), sorted(images.items()))).encode())
    for question in questions:
        states = [_state(image, question) for image in question.images]
        digest.update(repr((question.index, question.where, question.references, states)).encode(errors='replace'))
        digest.update(question.prompt.input_ids.tobytes())
    return digest.hexdigest()


def _state(image: ImageRef, question: Question) -> Any:
    if image.path is None:
        return hashlib.sha256(image.data or b'').hexdigest()
    return image.path, file_state(image.path, question.root)


@dataclass(frozen=True)
class QuestionBatch:
    """Questions that are answered together."""

    number: int  # among all batches, answered or not
    questions: tuple[Question, ...]


def deal(
    questions: Sequence[Question], done: Mapping[int, Any], *, batch_size: int, world_size: int
) -> list[list[QuestionBatch]]:
    """Rounds of one batch per rank, longest first; all of a round with images, or all without.

    A batch of which any answer is missing is asked as a whole: in other company, an answer could differ in rounding.
    """
    rounds: list[list[QuestionBatch]] = []
    number = 0
    for with_images in (True, False):
        chosen = [question for question in questions if bool(question.images) == with_images]
        chosen.sort(key=lambda question: (-len(question.prompt), question.index))
        pending = []
        for start in range(0, len(chosen), batch_size):
            batch = QuestionBatch(number, tuple(chosen[start : start + batch_size]))
            number += 1
            if any(question.index not in done for question in batch.questions):
                pending.append(batch)
        rounds += [pending[start : start + world_size] for start in range(0, len(pending), world_size)]
    return rounds
