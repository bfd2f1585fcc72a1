"""Checks one small pack of the run's own data before the first step."""

import logging
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from torch import Tensor

from vlmtune.data import Processor
from vlmtune.engine.optim import unwrap
from vlmtune.engine.state import kept_rng
from vlmtune.models.isolation import check_isolation, check_positions
from vlmtune.registry import HOOKS
from vlmtune.structures import SampleKey

logger = logging.getLogger(__name__)

_ENOUGH = 8  # tokens that a sample of the check should have


def change_sample(sample: dict[str, Tensor], *, processor: Processor) -> dict[str, Tensor]:
    """A sample of the same shape with other text and other pixels.

    Control tokens and image tokens stay: they say what the sample is made of.

    Args:
        sample: as a data set gives it.
        processor: knows those tokens.
    """
    tokenizer = processor.tokenizer
    kept = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if processor.family.has_vision:
        kept.add(processor.image_token_id)
    ordinary = np.array(sorted(set(range(len(tokenizer))) - kept))
    ids = sample['input_ids'].numpy()
    others = ordinary[(np.searchsorted(ordinary, ids) + len(ordinary) // 2) % len(ordinary)]
    changed = {**sample, 'input_ids': torch.from_numpy(np.where(np.isin(ids, ordinary), others, ids))}
    for name, white in (('pixel_bytes', 255), ('pixel_values', 0.5), ('image_features', 0.5)):
        if name in sample:
            changed[name] = white - sample[name]
    return changed


def _two_samples(loader: Any) -> list[Any]:
    """Keys of two short samples, the first with an image if there is one; the same on every rank."""
    dataset = loader.dataset
    if not hasattr(dataset, 'lengths'):  # a stream
        return list(islice(chain.from_iterable(loader.batch_sampler.window.packs), 2))
    order = np.lexsort((dataset.lengths, dataset.lengths < _ENOUGH))
    with_image = order[dataset.patches[order] > 0]
    first = with_image[0] if len(with_image) else order[0]
    second = next((i for i in order if i != first), first)
    return [SampleKey(0, int(i)) for i in (first, second)]


def _longest(dataset: Any) -> int:
    """Tokens of the longest sample; of a stream, of the longest that it lets through."""
    return int(max(dataset.lengths)) if hasattr(dataset, 'lengths') else int(dataset.max_length)


@HOOKS.register_module()
class IsolationHook(Hook):
    """Stops a packed run whose samples see each other, before anything is learned.

    The Runner adds it to every run that packs.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        """Check, on every rank.

        Raises:
            TrainingError: the samples of a pack see each other.
            ConfigError: one is so long that it would move the positions of the others.
        """
        check_positions(
            unwrap(runner.model).model.config.get_text_config(), longest=_longest(runner.train_dataloader.dataset)
        )
        with kept_rng():
            self._check(runner)

    def _check(self, runner: Any) -> None:
        loader, device = runner.train_dataloader, runner.strategy.device
        keys = _two_samples(loader)
        if len(keys) < 2:
            logger.warning('the check that packed samples do not see each other needs two samples; it was not done')
            return
        first, second = (loader.dataset[key] for key in keys)
        other = change_sample(first, processor=runner.processor)
        packed, changed, alone = (
            {name: tensor.to(device) for name, tensor in loader.collate_fn(samples).items()}
            for samples in ([first, second], [other, second], [second])
        )
        border = len(first['input_ids'])
        report = check_isolation(unwrap(runner.model), packed=packed, changed=changed, alone=alone, border=border)
        logger.info(
            'packed samples do not see each other: %s; largest change %.1e, of the sample itself %.1e',
            report.attention,
            report.leak,
            report.own,
        )
