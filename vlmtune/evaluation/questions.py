"""Rows of a data set as questions: what the model is asked, and what it should say."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmtune.data import Processor
from vlmtune.data.bad_rows import BadSample, over_budget, paths_of
from vlmtune.data.boxes import write_boxes
from vlmtune.data.dataset_configs import members, open_rows
from vlmtune.data.downloads import download
from vlmtune.data.images import Root, read_image_size
from vlmtune.data.indexed import Indexed
from vlmtune.data.map_fns.turns import questions_allowed
from vlmtune.data.parallel import default_workers, map_chunks
from vlmtune.data.sources import where
from vlmtune.registry import build_callable
from vlmtune.structures import Conversation, ImageRef, Sample
from vlmtune.utils.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One row, asked.

    Attributes:
        index: of the row; those of a mixture are counted through.
        where: its place for messages, ``test.jsonl:812``.
        conversation: ends with a user message.
        references: answers that are right; none where the row has none.
        prompt: the conversation as tokens, up to where the model has to answer; with the sizes of the images.
        root: of relative image paths.
    """

    index: int
    where: str
    conversation: Conversation
    references: tuple[str, ...]
    prompt: Sample = field(repr=False)
    root: Root = field(default=None, repr=False)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images of the conversation."""
        return self.conversation.images

    @property
    def text(self) -> str:
        """What the user says last, without images."""
        return self.conversation.messages[-1].text


class Questions(Indexed[Question]):
    """The questions of a data set, in the order of its rows.

    Args:
        questions: of the rows that can be asked.
        bad: the rows that cannot.
        on_bad_sample: 'error' or 'skip', as in training: what becomes of rows that cannot be asked.
        bad_sample_budget: with 'skip', the share of rows that may be bad; above 0, one row always may.

    Raises:
        DataError: more rows are bad than may be, or none is left.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        bad: Sequence[BadSample] = (),
        on_bad_sample: str = 'error',
        bad_sample_budget: float = 0.01,
    ) -> None:
        self.questions = list(questions)
        self.on_bad_sample, self.bad_sample_budget = on_bad_sample, bad_sample_budget
        self._bad: dict[int, BadSample] = {}
        self.row_count = len(self.questions) + len(bad)
        for problem in bad:
            self.note_bad(problem)
        if bad:
            logger.warning(
                '%d of %d rows cannot be asked and are left out; the first is %s: %s',
                len(bad), self.row_count, bad[0].where, bad[0].reason,
            )  # fmt: skip
        if not self.questions:
            raise DataError(f'none of {self.row_count} rows can be asked; expected at least one')

    def __len__(self) -> int:
        return len(self.questions)

    def at(self, index: int) -> Question:
        """One question."""
        return self.questions[index]

    @property
    def bad(self) -> list[BadSample]:
        """Rows that could not be asked, in order."""
        return [self._bad[index] for index in sorted(self._bad)]

    def note_bad(self, problem: BadSample) -> None:
        """Count a row as one that cannot be asked; the same row counts once.

        Raises:
            DataError: it may not be bad, or too many are.
        """
        text = f'sample {problem.index} ({problem.where}): {problem.reason}'
        if self.on_bad_sample == 'error':
            raise DataError(text, kind=problem.error)
        if problem.index in self._bad:
            return
        self._bad[problem.index] = problem
        if over_budget(len(self._bad), self.row_count, self.bad_sample_budget):
            raise DataError(
                f'{len(self._bad)} of {self.row_count} rows are bad, more than '
                f'bad_sample_budget={self.bad_sample_budget}; the last is {text}'
            )


def open_questions(
    dataset: Mapping[str, Any],
    processor: Processor,
    *,
    reference_key: str | None = None,
    limit: int | None = None,
    cache_dir: str | None = None,
) -> Questions:
    """The rows of a data set as questions; nothing is planned and no pixel is decoded.

    A row's last answer is the reference, and what comes before is asked. A row that ends with the user is asked as it
    is.

    Args:
        dataset: the config of a SupervisedDataset, or of a MixedDataset of some, whose rows are asked once each.
        processor: of the model.
        reference_key: the field of a row that holds its reference, or a list of them; None: the last answer.
        limit: ask only the first rows.
        cache_dir: ``plan_cache_dir`` of the config; images of URLs are kept beside it.

    Raises:
        ConfigError: a data set of another class.
        DataError: a file or an image folder is not there, or rows are bad and may not be.
    """
    found: list[Question | BadSample] = []
    parts = list(members(dataset, cache_dir=cache_dir))
    for settings in parts:
        room = None if limit is None else limit - len(found)
        found += _open_member(settings, processor, reference_key=reference_key, limit=room, first=len(found))
    return Questions(
        [one for one in found if isinstance(one, Question)],
        bad=[one for one in found if isinstance(one, BadSample)],
        on_bad_sample='skip' if all(part.get('on_bad_sample') == 'skip' for part in parts) else 'error',
        bad_sample_budget=max(part.get('bad_sample_budget', 0.01) for part in parts),
    )


def _open_member(
    settings: Mapping[str, Any], processor: Processor, *, reference_key: str | None, limit: int | None, first: int
) -> list[Question | BadSample]:
    rows, root = open_rows(settings)
    ask = _Asker(rows, processor, build_callable(settings['dataset_map_fn']), root, reference_key, first)
    count = len(rows) if limit is None else min(len(rows), max(limit, 0))
    workers = settings.get('planning_workers')
    chunks = map_chunks(ask, count, workers=default_workers(count) if workers is None else workers)
    return [one for chunk in chunks for one in chunk]


@dataclass(frozen=True)
class _Asker:
    """Rows -> questions; worker processes call it with ranges."""

    rows: Sequence[Mapping[str, Any]]
    processor: Processor
    map_row: Callable[..., Conversation]
    root: Root
    reference_key: str | None
    first: int  # the index of row 0

    def __call__(self, rows: range) -> list[Question | BadSample]:
        with questions_allowed():
            return [self._ask(row) for row in rows]

    def _ask(self, row: int) -> Question | BadSample:
        place = where(self.rows, row)
        images: tuple[ImageRef, ...] = ()
        try:
            values = self.rows[row]
            whole: Conversation = self.map_row(values)
            images = whole.images
            return self._question(values, whole, index=self.first + row, place=place)
        except DataError as error:
            return BadSample(self.first + row, place, str(error), 'bad', error.kind, paths_of(images))
        except Exception as error:
            error.add_note(f'while asking sample {row} ({place})')
            raise

    def _question(self, values: Mapping[str, Any], whole: Conversation, *, index: int, place: str) -> Question:
        for image in whole.images:
            download(image.path or '', self.root)
        sizes = [read_image_size(image, root=self.root) for image in whole.images]
        whole = write_boxes(whole, processor=self.processor, image_sizes=sizes)
        answered = whole.messages[-1].role == 'assistant'
        asked = replace(whole, messages=whole.messages[:-1]) if answered else whole
        if not asked.messages or asked.messages[-1].role != 'user':
            raise DataError('asks nothing: there is no user message before the last answer; fix the row')
        if self.reference_key is not None:
            references = _references(values, self.reference_key)
        else:
            references = (whole.messages[-1].text,) if answered else ()
        prompt = self.processor.tokenize(asked, image_sizes=sizes, add_generation_prompt=True)
        return Question(index, place, asked, references, prompt, self.root)


def _references(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """What a row holds under a key: a text, a number, or a list of those or of ``{"answer": text}`` as VQA has them.

    Raises:
        DataError: anything else, or nothing.
    """
    value = row.get(key)
    values = value if isinstance(value, list | tuple) else [value]
    plain = [one.get('answer') if isinstance(one, Mapping) else one for one in values]
    if not plain or not all(isinstance(one, str | int | float) for one in plain):
        raise DataError(f'{key!r} is {value!r:.80}; expected a text or a list of texts (reference_key={key!r})')
    return tuple(map(str, plain))
