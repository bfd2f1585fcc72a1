"""The training data of a config, to be looked at instead of trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from mmengine.config import Config

from vlmtune.config import config_mistakes, load_config
from vlmtune.data import (
    MixedDataset,
    Processor,
    StepDataLoader,
    StreamingDataset,
    SupervisedDataset,
    build_train_loader,
)
from vlmtune.data.dataset_configs import is_a, members, open_rows
from vlmtune.data.images import Root
from vlmtune.data.row_streams import StreamedRows, open_stream
from vlmtune.registry import DATASETS, PROCESSORS, build_callable
from vlmtune.structures import Conversation, Sample
from vlmtune.utils.errors import DataError

_REQUIRED = ('processor', 'train_dataloader', 'train_cfg', 'randomness')
STREAM_ROWS = 5_000
"""How many rows of a stream are looked at, from its start."""


def read_data_config(config: str, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """A config of which the parts that make data are there; its work dir may be in use.

    Raises:
        ConfigError: every mistake in the config and the overrides, at once.
    """
    cfg = load_config(config, overrides, check=partial(config_mistakes, required=_REQUIRED))
    if cfg.randomness.get('seed') is None:
        cfg.randomness.seed = 0  # a run would draw one
    return cfg


@dataclass(frozen=True)
class DataPart:
    """One data set of a config, opened but not planned.

    Attributes:
        rows: what ``SupervisedDataset(rows=...)`` takes.
        map_row: row -> Conversation.
        map_template: Conversation -> Sample.
        image_folder: root of the images.
        settings: the config of the data set, changed so that no row stops it.
        overlong: what the config says becomes of samples that are too long.
    """

    rows: Sequence[Any]
    map_row: Callable[[Any], Conversation]
    map_template: Callable[..., Sample]
    image_folder: Root
    settings: dict[str, Any]
    overlong: str

    def build(self, processor: Processor) -> SupervisedDataset:
        """Plan every row.

        Raises:
            DataError: not one row can be used.
        """
        return DATASETS.build(self.settings, default_args=dict(processor=processor))


def open_parts(cfg: Config) -> list[DataPart]:
    """The data sets that a config trains on, with their rows opened.

    Raises:
        ConfigError: a data set of another class than ours.
        DataError: a file or an image folder does not exist or cannot be read at all.
    """
    dataset = cfg.train_dataloader.get('dataset') or {}
    if is_a(dataset, StreamingDataset):
        return [_open_part(_first_rows(dataset))]
    return [_open_part(settings) for settings in members(dataset, cache_dir=cfg.get('plan_cache_dir'))]


def _first_rows(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a stream as that of a data set of its first rows.

    Raises:
        DataError: the stream is empty.
    """
    stream = open_stream(dataset['rows'])
    rows = list(islice(stream.read(), STREAM_ROWS + 1))
    if not rows:
        raise DataError(f'{stream.name} holds no rows; expected at least one')
    name = stream.name if len(rows) <= STREAM_ROWS else f'{stream.name} (the first {STREAM_ROWS:,} rows)'
    settings = {key: value for key, value in dataset.items() if key != 'shuffle_window'}
    return {
        **settings,
        'type': SupervisedDataset,
        'rows': StreamedRows(rows[:STREAM_ROWS], name=name),
        'cache_dir': None,
    }


def build_dataset(cfg: Config, parts: Sequence[DataPart], processor: Processor) -> SupervisedDataset | MixedDataset:
    """The data set of a run, every row of it planned.

    Raises:
        UserError: a data set without one usable row, or a mixture that cannot be made.
    """
    built = [part.build(processor) for part in parts]
    dataset = cfg.train_dataloader.dataset
    if 'datasets' not in dataset:
        return built[0]
    return DATASETS.build({**dataset, 'datasets': built}, default_args=dict(processor=processor))


def _open_part(settings: dict[str, Any]) -> DataPart:
    settings.pop('bad_samples_file', None)  # looking writes nothing
    rows, root = open_rows(settings)
    overlong = settings.get('overlong', 'drop')
    lenient = dict(
        rows=rows,
        on_bad_sample='skip',
        bad_sample_budget=1.0,
        overlong='drop' if overlong == 'error' else overlong,
    )
    return DataPart(
        rows=rows,
        map_row=build_callable(settings['dataset_map_fn']),
        map_template=build_callable(settings['template_map_fn']),
        image_folder=root,
        settings={**settings, **lenient},
        overlong=overlong,
    )


def build_processor(cfg: Config) -> Processor:
    """The processor of a config.

    Raises:
        UserError: it cannot be loaded.
    """
    return PROCESSORS.build(cfg.processor)


def members_of(dataset: SupervisedDataset | MixedDataset) -> list[SupervisedDataset]:
    """The data sets of a mixture, or the one."""
    return dataset.members if isinstance(dataset, MixedDataset) else [dataset]


def build_loader(cfg: Config, dataset: SupervisedDataset | MixedDataset) -> StepDataLoader:
    """The loader of a run of one process; nothing is loaded until it is iterated.

    Raises:
        UserError: as ``build_train_loader``.
    """
    options = {key: value for key, value in cfg.train_dataloader.items() if key != 'dataset'}
    return build_train_loader(
        dataset,
        seed=cfg.randomness.seed,
        accumulative_counts=cfg.train_cfg.get('accumulative_counts', 1),
        **{**options, 'num_workers': 0, 'prefetch_factor': None, 'pin_memory': False},
    )
