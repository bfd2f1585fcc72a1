"""The rows of a config that are not trained on, opened as a run opens them."""

from collections.abc import Callable
from dataclasses import dataclass

from mmengine.config import Config

from vlmtune.data import Processor
from vlmtune.engine.build import build_validation
from vlmtune.engine.precheck import check_validation
from vlmtune.evaluation import Evaluator, Questions, open_questions
from vlmtune.utils.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """What ``val_dataloader`` or ``test_dataloader`` holds.

    Attributes:
        name: of the two.
        rows: of the data set.
        questions: that are asked.
        bad: rows that cannot be used, and may be.
        stops: why ``vlmtune train --dry-run`` or ``vlmtune test`` would stop; the numbers are 0 then.
    """

    name: str
    rows: int = 0
    questions: int = 0
    bad: int = 0
    stops: str | None = None


def check_held_out(cfg: Config, *, processor: Processor) -> list[HeldOut]:
    """Read the rows of validation and test, where a config has some; nothing is written but plans.

    Args:
        cfg: its training data was looked at before.
        processor: of the config.
    """
    checks: dict[str, Callable[[], HeldOut]] = {
        'val_dataloader': lambda: _validation(cfg, processor),
        'test_dataloader': lambda: _test(cfg, processor),
    }
    return [_checked(name, check) for name, check in checks.items() if cfg.get(name) is not None]


def _checked(name: str, check: Callable[[], HeldOut]) -> HeldOut:
    try:
        return check()
    except UserError as error:
        return HeldOut(name, stops=str(error))
    except Exception as error:  # a function of the user's own may fail in any way; what is known already is printed
        told = [f'{type(error).__name__}: {error}', *getattr(error, '__notes__', ())]
        return HeldOut(name, stops=', '.join(told))


def _validation(cfg: Config, processor: Processor) -> HeldOut:
    check_validation(cfg, hooks=())
    dataset = cfg.val_dataloader.dataset
    for part in (dataset, *dataset.get('datasets', ())):
        part.pop('bad_samples_file', None)  # looking writes nothing
    built = build_validation(cfg, processor=processor)
    assert built is not None
    planned, questions = built['dataloader'].dataset, built['questions']
    bad = len(planned.bad_samples) + len(planned.overlong_samples)
    return HeldOut('val_dataloader', len(planned.rows), len(questions or ()), bad)


def _test(cfg: Config, processor: Processor) -> HeldOut:
    given = cfg.get('test_evaluator') or cfg.get('val_evaluator') or {}
    evaluator = Evaluator(**given, processor=processor, at='test_evaluator')
    questions: Questions = open_questions(
        cfg.test_dataloader.dataset,
        processor,
        reference_key=evaluator.reference_key,
        limit=(cfg.get('test_cfg') or {}).get('limit'),
        cache_dir=cfg.get('plan_cache_dir'),
    )
    evaluator.check_references([question.references for question in questions])
    return HeldOut('test_dataloader', questions.row_count, len(questions), len(questions.bad))
