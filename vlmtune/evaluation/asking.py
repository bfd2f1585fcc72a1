"""One batch of questions: its images, the model's answers, and what to say when memory runs out."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from PIL.Image import Image
from torch import Tensor

from vlmtune.data import Processor
from vlmtune.data.bad_rows import BadSample
from vlmtune.data.images import resolve_image_path
from vlmtune.data.sample_loading import blank_images, load_images
from vlmtune.evaluation.batches import QuestionBatch
from vlmtune.evaluation.generation import Answer, answer_prompts, prompt_inputs
from vlmtune.evaluation.prediction_file import PredictionRow
from vlmtune.evaluation.questions import Question, Questions
from vlmtune.structures import ImageRef
from vlmtune.utils.device import is_out_of_memory
from vlmtune.utils.errors import DataError, UserError, first_line

logger = logging.getLogger(__name__)

Gather: TypeAlias = Callable[[Any], list[Any]]
"""One plain value of every rank, by rank; all ranks call it at the same points."""


class PredictionError(UserError):
    """Not all questions could be answered."""


def attempt(action: Callable[[], None]) -> Exception | None:
    """What went wrong, to be told to the other ranks before it is raised: they would wait for this one."""
    try:
        action()
    except Exception as error:
        return error
    return None


def raise_first(failures: Sequence[Any], *, rank: int) -> None:
    """Raise this rank's own failure, or that another one has failed.

    Raises:
        PredictionError: in the words of the first one that has failed.
    """
    if isinstance(failures[rank], Exception):
        raise failures[rank]
    if told := [failure for failure in failures if failure is not None]:
        raise PredictionError(str(told[0]))


@dataclass(frozen=True)
class Asker:
    """Asks one rank's questions. ``gather`` is there if all ranks have to call the model together."""

    model: Any
    processor: Processor
    questions: Questions
    settings: Mapping[str, Any]
    seed: int
    rank: int
    gather: Gather | None
    should_stop: Callable[[], bool] | None = None

    def stops(self) -> bool:
        """Whether to ask nothing more; where ranks call the model together, all stop with the first."""
        if self.should_stop is None:
            return False
        stop = self.should_stop()
        return stop if self.gather is None else any(self.gather(stop))

    def load(self, batch: QuestionBatch) -> tuple[dict[str, Tensor], dict[int, DataError]]:
        """The inputs of a batch; blank images stand for those that turn out to be broken."""
        images: list[list[Image]] = []
        broken: dict[int, DataError] = {}
        for question in batch.questions:
            try:
                images.append(load_images(question.prompt, root=question.root))
            except DataError as error:
                broken[question.index] = error
                images.append(blank_images(question.prompt))
        prompts = [question.prompt for question in batch.questions]
        return prompt_inputs(self.processor, prompts, images=images), broken

    def note_broken(self, batch: QuestionBatch, broken: Mapping[int, DataError]) -> list[PredictionRow]:
        """Count rows that cannot be asked.

        Raises:
            DataError: they may not be broken.
        """
        rows = []
        for question in batch.questions:
            if (error := broken.get(question.index)) is not None:
                problem = BadSample(question.index, question.where, str(error), 'bad', error.kind)
                self.questions.note_bad(problem)
                logger.warning('sample %d (%s): %s; it is left out', problem.index, problem.where, problem.reason)
                rows.append(dict(index=problem.index, where=problem.where, error=error.kind, reason=problem.reason))
        return rows

    def ask(self, batch: QuestionBatch, inputs: Mapping[str, Tensor]) -> list[Answer]:
        """The answers of the model; sampling draws from a generator of the batch's own."""
        synced: dict[str, Any] = {'synced_gpus': True} if self.gather is not None else {}
        with _own_randomness(self.settings, seed=self.seed + batch.number):
            return answer_prompts(self.model, self.processor, inputs, **self.settings, **synced)

    def row(self, question: Question, answer: Answer, *, seconds: float) -> PredictionRow:
        """The line of one answer."""
        is_image = question.prompt.input_ids == self.processor.image_token_id if question.images else None
        return dict(
            index=question.index,
            where=question.where,
            question=question.text,
            images=[_shown(image, question) for image in question.images],
            image_sizes=[[size.width, size.height] for size in question.prompt.image_sizes],
            references=list(question.references),
            prediction=answer.text,
            prompt_tokens=len(question.prompt),
            image_tokens=0 if is_image is None else int(is_image.sum()),
            output_tokens=answer.tokens,
            seconds=round(seconds, 6),
            finish=answer.finish,
            scores={},
        )


def _shown(image: ImageRef, question: Question) -> str:
    return str(image) if image.path is None else str(resolve_image_path(image, question.root))


@contextmanager
def _own_randomness(settings: Mapping[str, Any], *, seed: int) -> Iterator[None]:
    if not settings.get('do_sample'):
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def take_loaded(coming: Future, asker: Asker, batch: QuestionBatch) -> tuple[dict[str, Tensor], list[PredictionRow]]:
    """What was loaded; where ranks call the model together, a failure to load is one of all."""
    found: list[tuple[dict[str, Tensor], list[PredictionRow]]] = []

    def take() -> None:
        inputs, broken = coming.result()
        found.append((inputs, asker.note_broken(batch, broken)))

    failure = attempt(take)
    if asker.gather is not None:
        told = asker.gather(None if failure is None else str(failure))
        raise_first([failure if i == asker.rank else text for i, text in enumerate(told)], rank=asker.rank)
    if failure is not None:
        raise failure
    return found[0]


# ---- out of memory


def ask_or_explain(asker: Asker, batch: QuestionBatch, inputs: Mapping[str, Tensor]) -> list[Answer]:
    try:
        return asker.ask(batch, inputs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Not inside the handler: the error holds on to all that the model had computed.
    raise PredictionError(_advice(asker, batch, reason))


def _advice(asker: Asker, batch: QuestionBatch, reason: str) -> str:
    longest, count = batch.questions[0], len(batch.questions)
    images = len(longest.images)
    pictures = f', {images} image{"s" if images > 1 else ""}' if images else ''
    said = (
        f'out of memory while answering {longest.where} ({len(longest.prompt):,} tokens{pictures}) '
        f'in a batch of {count} ({reason})'
    )
    fits = _largest_that_fits(asker, batch) if asker.gather is None else count // 2
    if fits:
        tried = 'tried, it fits' if asker.gather is None else 'not tried'
        return f'{said}; set batch_size {fits} ({tried})'
    return f'{said}; not even it alone fits: use smaller images, fewer max_new_tokens, or a quantised model'


def _largest_that_fits(asker: Asker, batch: QuestionBatch) -> int:
    """The largest half, quarter, ... of the batch that can be answered; 0 if not even one can."""
    count = len(batch.questions) // 2
    while count:
        _empty_cache()
        smaller = QuestionBatch(batch.number, batch.questions[:count])
        try:
            asker.ask(smaller, asker.load(smaller)[0])
            return count
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        count //= 2
    return 0


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
