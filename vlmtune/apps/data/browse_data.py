"""``vlmtune browse-data``: samples as the model gets them, on a page or in a terminal."""

import bisect
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from vlmtune.apps.data.browse_page import as_page
from vlmtune.apps.data.browse_text import as_text
from vlmtune.apps.data.shown_samples import ShownPack, show_sample
from vlmtune.apps.data.train_data import (
    build_dataset,
    build_loader,
    build_processor,
    members_of,
    open_parts,
    read_data_config,
)
from vlmtune.data import MixedDataset, SupervisedDataset
from vlmtune.utils.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

PACKS = 5
"""How many packs of the first epoch are shown."""


def browse_data(
    config: str,
    *,
    out: str | None = None,
    count: int = 20,
    indices: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Show samples of a config's training data: images, text, what is learned, lengths, and the first packs.

    Args:
        config: path of a config or name of a built-in recipe.
        out: the HTML page to write; it needs no other file and no network. None prints to the terminal.
        count: how many samples are chosen; the seed of the config chooses.
        indices: show these samples instead; they count the usable rows from 0.
        overrides: ``--cfg-options``.

    Raises:
        UserError: the config is wrong, the data holds not one usable row, a sample that does not exist is asked for,
            or the page cannot be written.
    """
    cfg = read_data_config(config, overrides=overrides)
    parts = open_parts(cfg)
    processor = build_processor(cfg)
    dataset = build_dataset(cfg, parts, processor)
    members = members_of(dataset)
    ends = list(accumulate(map(len, members)))
    shown = []
    for index in _choose(len(dataset), count=count, indices=indices, seed=cfg.randomness.seed):
        which = bisect.bisect_right(ends, index)
        member = members[which]
        at = index - ends[which] + len(member)
        shown.append(show_sample(index, part=parts[which], dataset=member, at=at, processor=processor))
    packs = _first_packs(cfg, dataset)
    if out is None:
        print(as_text(shown, packs, colours=sys.stdout.isatty()))
        return
    _write(Path(out), as_page(shown, packs, title=os.path.basename(config), samples=len(dataset)))
    logger.info('%d samples and %d packs written to %s', len(shown), len(packs), out)


def _choose(samples: int, *, count: int, indices: Sequence[int] | None, seed: int) -> list[int]:
    if indices is None:
        return np.sort(np.random.default_rng(seed).choice(samples, min(count, samples), replace=False)).tolist()
    if wrong := [index for index in indices if not 0 <= index < samples]:
        raise ConfigError(f'--indices {wrong[0]}: there are {samples} usable samples, 0 to {samples - 1}')
    return list(indices)


def _first_packs(cfg: Config, dataset: SupervisedDataset | MixedDataset) -> list[ShownPack]:
    """The first packs or batches of the first epoch."""
    loader = build_loader(cfg, dataset)
    room = dataset.max_length if cfg.train_dataloader.get('pack_to_max_length') else None
    lengths = dataset.lengths
    packs = []
    for number, pack in enumerate(loader.batch_sampler.plan[:PACKS]):  # type: ignore[union-attr]
        tokens = lengths[pack].tolist()
        packs.append(
            ShownPack(
                number=number,
                samples=list(zip(pack, [dataset.where(i) for i in pack], tokens, strict=True)),
                room=room if room is not None else max(tokens) * len(tokens),
            )
        )
    return packs


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding='utf-8')
    except OSError as error:
        raise UserError(f'--out {path}: cannot be written ({error.strerror})') from error
