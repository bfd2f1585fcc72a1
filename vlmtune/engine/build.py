"""From a config to data and model: what a run, a trial without training and the data verbs build alike."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_dist_info

from vlmtune.config.signature import Signature
from vlmtune.config.targets import find_target
from vlmtune.data import Processor, StepDataLoader, SupervisedDataset, build_train_loader
from vlmtune.data.dataset_configs import without_augmentation
from vlmtune.engine.hooks.dataset_info import describe_data
from vlmtune.engine.precheck import check_new_tokens
from vlmtune.engine.sharded_loading import needs_images_everywhere
from vlmtune.evaluation import Evaluator
from vlmtune.evaluation.questions import open_questions
from vlmtune.models import SupervisedFinetune
from vlmtune.registry import DATASETS, MODELS, PROCESSORS
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import DataError

logger = logging.getLogger(__name__)


def build_data(cfg: Config, *, bad_samples_file: Path | None = None) -> tuple[Processor, StepDataLoader]:
    """Processor, data set (planned and checked) and loader of a config.

    Args:
        cfg: of the run.
        bad_samples_file: where the data set writes what it could not use; None writes nothing.
    """
    processor = PROCESSORS.build(cfg.processor)
    if processor.image_processor is not None:
        names = [type(part).__name__ for part in (processor.image_processor, processor.tokenizer)]
        logger.info('images go through %s, text through %s', *names)
    check_new_tokens(cfg, processor=processor)
    options = dict(cfg.train_dataloader)
    dataset = _build_dataset(cfg, options.pop('dataset'), processor=processor, bad_samples_file=bad_samples_file)
    accumulative_counts = cfg.train_cfg.get('accumulative_counts', 1)
    seed = cfg.randomness.seed
    return processor, _build_loader(cfg, dataset, seed=seed, accumulative_counts=accumulative_counts, **options)


def build_validation(
    cfg: Config, *, processor: Processor, bad_samples_file: Path | None = None
) -> dict[str, Any] | None:
    """What a ValLoop needs besides the Runner: held-out rows, planned and checked, once to learn and once to answer.

    Rows are put into micro-batches as ``train_dataloader`` says, so that what fits in training fits here.

    Args:
        cfg: of the run.
        processor: of the run.
        bad_samples_file: where the data set writes what it could not use; None writes nothing.

    Returns:
        the arguments, or None where the config has no ``val_dataloader``.

    Raises:
        UserError: anything in the config or the data that the user can mend.
    """
    if cfg.get('val_dataloader') is None:
        return None
    part = without_augmentation(cfg.val_dataloader.dataset)
    try:
        dataset = _build_dataset(cfg, part, processor=processor, bad_samples_file=bad_samples_file)
    except DataError as error:
        raise DataError(f'held-out data: {error}; val_dataloader=None trains without', kind=error.kind) from error
    names = ('batch_size', 'num_workers', 'pack_to_max_length', 'max_patches', 'pin_memory', 'timeout')
    options = {name: cfg.train_dataloader[name] for name in names if name in cfg.train_dataloader}
    logger.info('held-out data: %s', describe_data(dataset))
    loader = _build_loader(cfg, dataset, seed=0, shuffle=False, group_by_length=True, **options)
    evaluator = Evaluator(**cfg.get('val_evaluator') or {}, processor=processor, at='val_evaluator')
    questions = None
    if evaluator.metrics:
        questions = open_questions(
            part,
            processor,
            reference_key=evaluator.reference_key,
            limit=cfg.val_cfg.get('limit'),
            cache_dir=cfg.get('plan_cache_dir'),
        )
    batch_size = cfg.val_dataloader.get('batch_size', 1)
    return dict(dataloader=loader, evaluator=evaluator, questions=questions, batch_size=batch_size)


def _build_dataset(
    cfg: Config, part: Mapping[str, Any], *, processor: Processor, bad_samples_file: Path | None
) -> SupervisedDataset:
    target = find_target(part['type'], must_exist=True)
    known = Signature.of(target) if target is not None else None
    offered = dict(
        cache_dir=cfg.get('plan_cache_dir'),
        bad_samples_file=bad_samples_file and str(bad_samples_file),
        seed=cfg.randomness.seed,
    )
    taken = {name: value for name, value in offered.items() if known is not None and name in known.names}
    return DATASETS.build(part, default_args=dict(processor=processor, **taken))


def _build_loader(cfg: Config, dataset: SupervisedDataset, **options: Any) -> StepDataLoader:
    rank, world_size = get_dist_info()
    everywhere = needs_images_everywhere(cfg.get('strategy'))
    return build_train_loader(dataset, rank=rank, world_size=world_size, images_in_every_batch=everywhere, **options)


def build_model(cfg: Config, *, processor: Processor, device: str | None = None) -> SupervisedFinetune:
    """The model of a config, with room for the processor's new tokens.

    Args:
        cfg: of the run.
        processor: of the run.
        device: 'meta' builds it without weights.
    """
    vocab_size = len(processor.tokenizer) if processor.added_tokens else None
    defaults = dict(vocab_size=vocab_size, device=device or str(find_device()))
    return MODELS.build(cfg.model, default_args=defaults)
