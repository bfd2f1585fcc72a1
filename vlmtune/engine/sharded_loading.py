"""Weights that are read piece by piece: under ZeRO-3 no rank ever holds the whole model.

transformers asks a configuration that somebody has registered whether ZeRO-3 is on. If it is, ``from_pretrained`` makes
the model inside ``deepspeed.zero.Init``, which shards every layer as soon as it exists; then the first rank reads the
file (mapped, not copied) one layer at a time, and hands each rank its piece.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vlmtune.engine.deepspeed import import_deepspeed
from vlmtune.engine.deepspeed_config import config_of, without_auto, zero_stage
from vlmtune.models.loading import parse_dtype
from vlmtune.models.sharded import loaded_in_pieces
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def needs_images_everywhere(strategy: Mapping[str, Any] | None) -> bool:
    """Whether the strategy of a config is ZeRO, where ranks have to compute the same layers in every batch.

    Stage 3 gathers weights layer by layer. Stages 1 and 2 put gradients into buckets in the order in which they come,
    and add up the buckets of all ranks: where one rank has no image, gradients of different weights would be added.
    """
    return zero_stage(config_of(strategy)) > 0


def check_sharding(cfg: Mapping[str, Any]) -> None:
    """Tell whether a config asks for what cannot be done with weights in pieces.

    Args:
        cfg: of the run.

    Raises:
        ConfigError: quantised weights, DoRA, or a vision cache.
    """
    if zero_stage(config_of(cfg.get('strategy'))) != 3:
        return
    model = cfg['model']
    quantization = model.get('quantization')
    if quantization is not None:
        raise ConfigError(
            f'quantization={quantization!r} and ZeRO-3: quantised weights cannot be cut into pieces; '
            'use --deepspeed zero2, or set quantization=None'
        )
    parts = [part for part in model['tune'].values() if isinstance(part, Mapping)]
    if any(settings.get('use_dora') for settings in (model.get('lora') or {}, *parts)):
        raise ConfigError(
            'use_dora and ZeRO-3: DoRA looks at the norms of whole weights while it computes, which are in pieces; '
            'use --deepspeed zero2, or remove use_dora'
        )
    if cfg.get('vision_cache') is not None:
        raise ConfigError(
            'vision_cache and ZeRO-3: the encoder would have to run with weights in pieces; '
            'use --deepspeed zero2, or remove vision_cache'
        )


@contextmanager
def sharded_weights(cfg: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers models are loaded in pieces if the strategy is ZeRO-3; other strategies see no difference.

    The process group must be there. All ranks have to load the same models.

    Args:
        cfg: of the run; reads ``strategy`` and ``model.dtype``.
    """
    config = config_of(cfg.get('strategy'))
    if zero_stage(config) != 3:
        yield
        return
    import_deepspeed()
    logger.info('weights are loaded in pieces')
    dtype = parse_dtype(cfg['model'].get('dtype', 'bfloat16'))
    with loaded_in_pieces(_for_loading(config, dtype)):
        yield


def _for_loading(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The part of a DeepSpeed configuration that says how weights are cut."""
    return dict(
        train_micro_batch_size_per_gpu=1,  # must be given
        zero_optimization=without_auto(config['zero_optimization']),
        bf16=dict(enabled=dtype == torch.bfloat16),
        fp16=dict(enabled=dtype == torch.float16),
    )
