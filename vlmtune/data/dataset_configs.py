"""Configs of data sets, read without building what they describe: nothing is planned."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmtune.config.targets import find_target
from vlmtune.data.dataset import SupervisedDataset
from vlmtune.data.downloads import image_root
from vlmtune.data.images import Root
from vlmtune.data.mixture import MixedDataset
from vlmtune.registry import build_callable
from vlmtune.utils.errors import ConfigError

_HANDED_ON = ('cache_dir', 'planning_workers')  # by a mixture to its members


def is_a(dataset: Mapping[str, Any], expected: type) -> bool:
    """Whether a config describes a data set of this class."""
    kind = find_target(dataset.get('type'), must_exist=True)
    return isinstance(kind, type) and issubclass(kind, expected)


def members(dataset: Mapping[str, Any], *, cache_dir: str | None = None) -> Iterator[dict[str, Any]]:
    """The configs of the members of a mixture, or the one.

    Args:
        dataset: the config of a SupervisedDataset, or of a MixedDataset of some.
        cache_dir: for those that do not say themselves; ``plan_cache_dir`` of a config.

    Raises:
        ConfigError: a data set of another class, or such a member.
    """
    if cache_dir is not None:
        dataset = {'cache_dir': cache_dir, **dataset}
    shared = {key: dataset[key] for key in _HANDED_ON if key in dataset}
    for member in dataset['datasets'] if is_a(dataset, MixedDataset) else [dataset]:
        if not is_a(member, SupervisedDataset):
            kind = find_target(member.get('type'), must_exist=True)
            raise ConfigError(
                f'dataset: the rows of a {getattr(kind, "__name__", kind)} cannot be read by themselves; expected a '
                'SupervisedDataset, or a MixedDataset of some'
            )
        yield {**shared, **member}


def open_rows(settings: Mapping[str, Any]) -> tuple[Sequence[Any], Root]:
    """The rows of one member, and where their images lie.

    Raises:
        DataError: a file or an image folder is not there.
        ConfigError: ``url_hosts`` cannot be used.
    """
    rows = settings['rows']
    rows = build_callable(rows)() if isinstance(rows, Mapping) else rows
    folder, hosts = settings.get('image_folder'), settings.get('url_hosts', ())
    return rows, image_root(folder, url_hosts=hosts, cache_dir=settings.get('cache_dir'))


def without_augmentation(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a data set, also of a mixture, whose images stay as they are."""
    settings = {name: value for name, value in dataset.items() if name != 'image_transform'}
    if 'datasets' in settings:
        settings['datasets'] = [without_augmentation(member) for member in settings['datasets']]
    return settings
