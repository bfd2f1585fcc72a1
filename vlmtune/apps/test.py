"""``vlmtune test``: ask a model the questions of a data set, keep the answers, score them."""

import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_dist_info

from vlmtune.apps.answer_speed import speed_by_size, speed_table
from vlmtune.apps.export.trained import data_names
from vlmtune.apps.tested_model import TestedModel, load_tested, load_tested_processor, open_tested
from vlmtune.config import config_mistakes, load_config
from vlmtune.engine import ranks
from vlmtune.engine.group import in_group, read_together
from vlmtune.engine.run_layout import PREDICTIONS_FILE, RESULT_FILE, TEST_FOLDER
from vlmtune.engine.setup import Launcher
from vlmtune.engine.work_dir_lock import only_run_in
from vlmtune.evaluation import Evaluator, Questions, open_questions, predict
from vlmtune.evaluation.prediction_file import PredictionRow, write_rows
from vlmtune.utils.disk import replace_text
from vlmtune.utils.errors import ConfigError, Stopped

logger = logging.getLogger(__name__)

_REQUIRED = ('processor', 'model')


def read_test_config(config: str, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """A config whose ``test_dataloader`` and ``test_evaluator`` are there; where it has none, those of validation are.

    Raises:
        ConfigError: every mistake in the config and the overrides, at once; or it has no data to test on.
    """
    cfg = load_config(config, overrides, check=partial(config_mistakes, required=_REQUIRED))
    for name in ('dataloader', 'evaluator'):
        if cfg.get(f'test_{name}') is None:
            cfg[f'test_{name}'] = cfg.get(f'val_{name}')
    if cfg.test_dataloader is None:
        if 'val_data_path' in cfg:
            raise ConfigError(f'{config} has no data to test on; add --cfg-options val_data_path=FILE, or set it there')
        raise ConfigError(
            f'{config} has neither test_dataloader nor val_dataloader; add to its part 3 '
            "test_dataloader = dict(dataset=dict(train_dataset, rows=dict(type=load_rows, path='test.json')), "
            'batch_size=8)'
        )
    cfg.work_dir = cfg.get('work_dir') or f'work_dirs/{Path(str(cfg.filename)).stem}'
    return cfg


def evaluate(
    config: str,
    checkpoint: str | None = None,
    *,
    out: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    work_dir: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    launcher: Launcher = 'none',
) -> dict[str, float]:
    """Answer the questions of ``test_dataloader`` and print the scores; a run that was killed goes on.

    Args:
        config: path of a config or name of a built-in recipe.
        checkpoint: ``iter_N.pth``, an export, an adapter or a base model; None: the base model of the config.
        out: folder of ``predictions.jsonl`` and ``metrics.json``; ``<work dir>/test/<name of the checkpoint>``.
        limit: ask only the first questions; None: as ``test_cfg`` says, else all.
        batch_size: questions that are answered together; None: as the config says.
        work_dir: of the run; as in ``train``.
        overrides: ``--cfg-options``.
        launcher: 'none', 'pytorch', 'slurm'.

    Returns:
        The scores, on all ranks.

    Raises:
        UserError: anything that the user can mend.
    """
    read = partial(read_test_config, config, overrides=overrides)
    with in_group():
        cfg = read_together(read, launcher=launcher)
        base = (cfg.model or {}).get('pretrained_model_name_or_path')
        chosen = base if checkpoint is None else checkpoint
        folder = Path(out or Path(work_dir or cfg.work_dir, TEST_FOLDER, _name_of(checkpoint))).expanduser()
        size = batch_size or cfg.test_dataloader.get('batch_size') or 1
        limit = limit or (cfg.get('test_cfg') or {}).get('limit')
        data = list(data_names(cfg.test_dataloader))
        about = dict(config=config, checkpoint=str(chosen), data=data, limit=limit, batch_size=size)
        return _run(cfg, chosen, folder=folder, limit=limit, about=about)


def _name_of(checkpoint: str | None) -> str:
    """``work_dirs/x/iter_500.pth`` -> ``iter_500``; a hub id keeps its owner out."""
    return 'base' if checkpoint is None else Path(checkpoint).expanduser().absolute().name.removesuffix('.pth')


def _run(
    cfg: Config, checkpoint: Any, *, folder: Path, limit: int | None, about: Mapping[str, Any]
) -> dict[str, float]:
    """Mistakes in metrics and data are told before the weights are read, and before anything is written."""
    with ranks.together('reading the questions'):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f'{folder} is a file; answers need a folder, choose another --out')
        opened = open_tested(checkpoint)
        processor = load_tested_processor(cfg, opened)
        at = 'val_evaluator' if cfg.test_evaluator == cfg.get('val_evaluator') else 'test_evaluator'
        evaluator = Evaluator(**(cfg.test_evaluator or {}), processor=processor, at=at)
        key = evaluator.reference_key
        stored = cfg.get('plan_cache_dir')
        questions = open_questions(
            cfg.test_dataloader.dataset, processor, reference_key=key, limit=limit, cache_dir=stored
        )
        evaluator.check_references([question.references for question in questions])
        logger.info('%d questions, %d a batch, answers go to %s', len(questions), about['batch_size'], folder)
    with only_run_in(folder, rank=get_dist_info()[0]):
        with ranks.together('loading the model'):
            tested = load_tested(cfg, opened)
        return _ask(tested, questions, evaluator, folder=folder, about=about)


def _ask(
    tested: TestedModel, questions: Questions, evaluator: Evaluator, *, folder: Path, about: Mapping[str, Any]
) -> dict[str, float]:
    rank, world_size = get_dist_info()
    started = time.monotonic()
    with ranks.together('answering the questions'):
        try:
            rows = _answers(
                tested, questions, evaluator, file=folder / PREDICTIONS_FILE, batch_size=about['batch_size']
            )
        except KeyboardInterrupt as error:
            ranks.tell(error)
            raise Stopped(
                f'interrupted; what is answered stays in {folder}, and the same command goes on with it', exit_code=130
            ) from None
    seconds = time.monotonic() - started
    scores: dict[str, float] = {}
    with ranks.together('scoring the answers'):
        if rank == 0:
            about = dict(about, processes=world_size, seconds=round(seconds, 3))
            scores = _score(rows, questions, evaluator, folder=folder, about=about)
    return ranks.gather(scores, what='sharing the scores')[0]


def _answers(
    tested: TestedModel, questions: Questions, evaluator: Evaluator, *, file: Path, batch_size: int
) -> list[PredictionRow]:
    rank, world_size = get_dist_info()
    rows = predict(
        tested.model,
        evaluator.processor,
        questions,
        file=file,
        model_key=tested.key,
        batch_size=batch_size,
        generation=evaluator.generation,
        autocast_dtype=tested.autocast_dtype,
        rank=rank,
        world_size=world_size,
        gather=partial(ranks.gather, what='answering the questions'),
        tell=ranks.tell,
    )
    return rows or []


def _score(
    rows: list[PredictionRow], questions: Questions, evaluator: Evaluator, *, folder: Path, about: Mapping[str, Any]
) -> dict[str, float]:
    """Write scores beside the answers, and print them."""
    scores = evaluator.scores(rows)
    for row in rows:
        row['scores'] = evaluator.row_scores(row)
    write_rows(folder / PREDICTIONS_FILE, rows)
    classes = speed_by_size(rows)
    cut = sum(row['finish'] == 'length' for row in rows)
    skipped = [dict(index=bad.index, where=bad.where, reason=bad.reason) for bad in questions.bad]
    rules = {name: evaluator.rule_of(name) for name in scores}
    result = dict(
        about, metrics=scores, rules=rules, samples=len(rows), cut_off=cut, skipped=skipped,
        without_reference=sum(not row['references'] for row in rows), generation=evaluator.generation, speed=classes,
    )  # fmt: skip
    replace_text(folder / RESULT_FILE, json.dumps(result, indent=2, ensure_ascii=False, default=str) + '\n')
    if cut:
        logger.warning('%d of %d answers reached max_new_tokens and are cut off', cut, len(rows))
    print(speed_table(classes))
    for name, value in scores.items():
        print(f'{name}: {value:.4f}')
    print(f'{len(rows)} answers in {folder / PREDICTIONS_FILE}, scores in {folder / RESULT_FILE}')
    return scores
