"""Answers to the questions of a data set: in batches of like length, shared among ranks, kept as they come."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vlmtune.data import Processor
from vlmtune.data.bad_rows import BadSample
from vlmtune.evaluation.asking import Asker, Gather, ask_or_explain, attempt, raise_first, take_loaded
from vlmtune.evaluation.batches import QuestionBatch, deal, fingerprint
from vlmtune.evaluation.generation import answering
from vlmtune.evaluation.prediction_file import PredictionFile, PredictionRow
from vlmtune.evaluation.questions import Questions
from vlmtune.utils.progress import Progress

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128
"""Tokens of an answer, where the settings do not say."""


def predict(
    model: Any,
    processor: Processor,
    questions: Questions,
    *,
    file: Path,
    model_key: str = '',
    batch_size: int = 1,
    generation: Mapping[str, Any] | None = None,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    synced: bool = False,
    should_stop: Callable[[], bool] | None = None,
    tell: Callable[[Exception], None] | None = None,
) -> list[PredictionRow] | None:
    """Ask the model; every rank calls it. Mode and random generators are as before afterwards.

    Batches are made of questions of like length, and never of some with and some without images. They do not depend on
    the number of ranks, nor on whether the run was killed on the way, so neither do the answers.

    Args:
        model: any transformers model that can generate.
        processor: of the model.
        questions: what to ask.
        file: where the rows are written; what a run of the same questions, settings and ``model_key`` has left there is
            kept, what any other has left is replaced.
        model_key: what tells this model from others, for example the digest of a checkpoint.
        batch_size: questions that are answered together.
        generation: settings of ``generate``; greedy unless ``do_sample`` is set.
        autocast_dtype: see ``answering``.
        seed: what sampling draws is a function of it and the batch.
        rank, world_size, gather: of the run; ``gather`` is needed where there are several ranks.
        synced: all ranks make the same number of calls to the model, because each holds a piece of every weight.
        should_stop: asked before every batch; what is answered until it says True is kept for the next run.
        tell: called with what this rank fails with, at once: the others may answer on for longer than it can wait.

    Returns:
        On the first rank one row per question, in order; nothing on the others. Rows that turned out to be bad are not
        among them but in ``questions.bad``. None on all ranks if any was stopped.

    Raises:
        DataError: an image is broken and may not be, or too many are.
        PredictionError: out of memory; says which batch size would do. Or another rank has failed.
        CheckpointError: the file cannot be written.
    """
    if gather is None:
        if world_size > 1:
            raise ValueError(f'{world_size} ranks need a gather')
        gather = _alone
    settings = {'max_new_tokens': MAX_NEW_TOKENS, **(generation or {})}
    key = fingerprint(questions, processor=processor, settings=dict(settings, seed=seed), model_key=model_key)
    kept = PredictionFile(file, fingerprint=gather(key)[0])  # times of files may differ where disks do
    done = _start(kept, rank=rank, gather=gather)
    if done:
        logger.info('%d of %d questions were answered before', len(done), len(questions))
    rounds = deal(questions, done, batch_size=batch_size, world_size=world_size)
    asker = Asker(model, processor, questions, settings, seed, rank, gather if synced else None, should_stop)
    rows: list[PredictionRow] = []
    failure = attempt(lambda: rows.extend(_answer_all(asker, rounds, kept, autocast_dtype=autocast_dtype)))
    if failure is not None and tell is not None:
        tell(failure)
    kept.close()
    is_whole = len(rows) == sum(len(batches[rank].questions) for batches in rounds if rank < len(batches))
    gathered = gather((None if failure is None else str(failure), rows, is_whole))
    raise_first([failure if i == rank else text for i, (text, *_) in enumerate(gathered)], rank=rank)
    if not all(whole for *_, whole in gathered):
        return None
    for _, others, _ in gathered:
        done |= {row['index']: row for row in others}
    ordered, bad = _sorted_out(done, questions)
    _tell(attempt(lambda: kept.finish(ordered, bad=bad)) if rank == 0 else None, rank=rank, gather=gather)
    kept.remove_part(rank)
    return ordered if rank == 0 else []


def _alone(value: Any) -> list[Any]:
    return [value]


def _start(kept: PredictionFile, *, rank: int, gather: Gather) -> dict[int, PredictionRow]:
    """What any rank can see of an earlier run, by index; the file is ready to be added to."""
    done: dict[int, PredictionRow] = {}
    for seen in gather(kept.read()):
        done |= seen
    failure = attempt(lambda: kept.start(done.values())) if rank == 0 else None
    _tell(failure, rank=rank, gather=gather)
    return done


def _tell(failure: Exception | None, *, rank: int, gather: Gather) -> None:
    """If one rank has failed, all do."""
    told = gather(None if failure is None else str(failure))
    raise_first([failure if i == rank else text for i, text in enumerate(told)], rank=rank)


def _sorted_out(
    done: Mapping[int, PredictionRow], questions: Questions
) -> tuple[list[PredictionRow], list[PredictionRow]]:
    ordered = [done[index] for index in sorted(done)]
    bad = [row for row in ordered if 'error' in row]
    for row in bad:
        questions.note_bad(BadSample(row['index'], row['where'], row['reason'], 'bad', row['error']))
    return [row for row in ordered if 'error' not in row], bad


# ---- the share of a rank


def _answer_all(
    asker: Asker, rounds: Sequence[Sequence[QuestionBatch]], kept: PredictionFile, *, autocast_dtype: torch.dtype | None
) -> Iterator[PredictionRow]:
    """The rows of this rank, each written as it comes. The images of the next batch load while the model answers."""
    rank, synced = asker.rank, asker.gather is not None
    mine = [(batches[min(rank, len(batches) - 1)], rank < len(batches)) for batches in rounds]  # with its own, or along
    mine = [(batch, own) for batch, own in mine if own or synced]
    kept.open_part(rank)
    progress = Progress('questions answered', total=sum(len(batch.questions) for batch, own in mine if own))
    with answering(asker.model, autocast_dtype=autocast_dtype), ThreadPoolExecutor(1) as loading:
        coming: Future | None = loading.submit(asker.load, mine[0][0]) if mine else None
        for i, (batch, own) in enumerate(mine):
            if asker.stops():
                return
            started = time.perf_counter()
            assert coming is not None
            loaded = take_loaded(coming, asker, batch)
            coming = loading.submit(asker.load, mine[i + 1][0]) if i + 1 < len(mine) else None
            inputs, rows = loaded
            answers = ask_or_explain(asker, batch, inputs)
            if not own:
                continue
            seconds = (time.perf_counter() - started) / len(batch.questions)
            bad = {row['index'] for row in rows}
            for question, answer in zip(batch.questions, answers, strict=True):
                if question.index not in bad:
                    rows.append(asker.row(question, answer, seconds=seconds))
            kept.add(rows)
            progress.add(len(batch.questions))
            yield from rows
