"""Shows one sample as the model gets it, before the first step."""

import logging
from itertools import groupby
from typing import Any

from mmengine.hooks import Hook

from vlmtune.data import Processor
from vlmtune.registry import HOOKS
from vlmtune.structures import IGNORE_INDEX, Sample
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def describe_sample(sample: Sample, *, processor: Processor) -> str:
    """The decoded sample; what is learned stands between ⟦ and ⟧, runs of image tokens are counted."""
    image = processor.image_token_id if processor.family.has_vision else None
    tokens = list(zip(sample.input_ids.tolist(), (sample.labels != IGNORE_INDEX).tolist(), strict=True))
    out = []
    for (is_image, learned), group in groupby(tokens, key=lambda t: (t[0] == image, t[1])):
        ids = [token for token, _ in group]
        if is_image:
            out.append(f'[{len(ids)} image tokens]')
            continue
        text = processor.tokenizer.decode(ids)
        out.append(f'⟦{text}⟧' if learned else text)
    return ''.join(out)


def describe_data(dataset: Any) -> str:
    """What was planned, in numbers; no sample is read."""
    bad, overlong = len(dataset.bad_samples), len(dataset.overlong_samples)
    return (
        f'{len(dataset):,} samples, {dataset.lengths.sum():,} tokens, {dataset.supervised.sum():,} of them learned; '
        f'{(dataset.patches > 0).sum():,} with images, {dataset.patches.sum():,} patches; '
        f'left out: {bad:,} bad, {overlong:,} over-long; {dataset.truncated:,} shortened'
    )


@HOOKS.register_module()
class DatasetInfoHook(Hook):
    """Logs the size of the data set and one decoded sample with its learned parts marked.

    Of a stream, which is not planned ahead, it shows the first sample that is learned.

    Args:
        index: the sample to show.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._to_show = False

    def before_train(self, runner: Any) -> None:
        """Log once, on the first rank."""
        if runner.rank != 0:
            return
        dataset, sampler = runner.train_dataloader.dataset, runner.train_loop.sampler
        if not hasattr(dataset, 'lengths'):
            self._to_show = True
            return
        packs, steps = len(sampler.plan), len(sampler)
        logger.info('%s; %d packs or batches and %d optimizer steps per epoch', describe_data(dataset), packs, steps)
        if self.index >= len(dataset):
            raise ConfigError(f'DatasetInfoHook: index={self.index}, but the data set has {len(dataset)} samples')
        self._show(f'sample {self.index}', dataset.samples[self.index], processor=runner.processor)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The first sample of a stream."""
        if self._to_show:
            self._to_show = False
            dataset, key = runner.train_dataloader.dataset, runner.train_loop.sampler.current_packs()[0][0]
            self._show(dataset.where(key.sample), dataset.samples[key.sample], processor=runner.processor)

    def _show(self, name: str, sample: Sample, *, processor: Processor) -> None:
        text = describe_sample(sample, processor=processor)
        logger.info('%s (%d tokens, learned parts between ⟦ and ⟧):\n%s', name, len(sample), text)
