"""Shows one sample as the model gets it, before the first step."""

import logging
from itertools import groupby
from typing import Any

from mmengine.hooks import Hook

from vlmtune.data import Processor, SupervisedDataset
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


@HOOKS.register_module()
class DatasetInfoHook(Hook):
    """Logs the size of the data set and one decoded sample with its learned parts marked.

    Args:
        index: the sample to show.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def before_train(self, runner: Any) -> None:
        """Log once, on the first rank."""
        if runner.rank != 0:
            return
        dataset: SupervisedDataset = runner.train_dataloader.dataset
        sampler = runner.train_loop.sampler
        tokens, images = dataset.lengths.sum(), sum(len(sample.images) for sample in dataset.samples)
        learned = sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in dataset.samples)
        logger.info(
            '%d samples, %d images, %d tokens, %d of them learned; '
            '%d packs or batches and %d optimizer steps per epoch',
            len(dataset),
            images,
            tokens,
            learned,
            len(sampler.plan),
            len(sampler),
        )
        if self.index >= len(dataset):
            raise ConfigError(f'DatasetInfoHook: index={self.index}, but the data set has {len(dataset)} samples')
        sample = dataset.samples[self.index]
        logger.info(
            'sample %d (%d tokens, learned parts between ⟦ and ⟧):\n%s',
            self.index,
            len(sample),
            describe_sample(sample, processor=runner.processor),
        )
