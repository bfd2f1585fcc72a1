"""From rows in any format to batches of tensors. Knows no model class."""

import vlmtune.utils.lean_imports  # noqa: F401  # before anything that imports transformers
from vlmtune.data.augmentation import color_jitter, jpeg_compression
from vlmtune.data.chat_template import chat_template_map_fn, plain_text_map_fn
from vlmtune.data.collate import Collator
from vlmtune.data.dataset import SupervisedDataset
from vlmtune.data.loader import StepDataLoader, build_train_loader
from vlmtune.data.map_fns import (
    alpaca_map_fn,
    llava_map_fn,
    minicpmv_map_fn,
    openai_map_fn,
    sharegpt_map_fn,
    text_map_fn,
)
from vlmtune.data.mixture import MixedDataset
from vlmtune.data.processor import Processor
from vlmtune.data.row_streams import stream_rows
from vlmtune.data.samplers import PackSampler
from vlmtune.data.sources import load_rows
from vlmtune.data.stream_sampler import StreamSampler
from vlmtune.data.streaming import StreamingDataset

__all__ = [
    'Collator',
    'MixedDataset',
    'PackSampler',
    'Processor',
    'StepDataLoader',
    'StreamSampler',
    'StreamingDataset',
    'SupervisedDataset',
    'alpaca_map_fn',
    'build_train_loader',
    'chat_template_map_fn',
    'color_jitter',
    'jpeg_compression',
    'llava_map_fn',
    'load_rows',
    'minicpmv_map_fn',
    'openai_map_fn',
    'plain_text_map_fn',
    'sharegpt_map_fn',
    'stream_rows',
    'text_map_fn',
]
