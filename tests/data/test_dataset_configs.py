import pytest

from vlmtune.data import MixedDataset, StreamingDataset, SupervisedDataset
from vlmtune.data.dataset_configs import members, open_rows, without_augmentation
from vlmtune.data.images import ImageRoot
from vlmtune.utils.errors import ConfigError

ONE = dict(type=SupervisedDataset, rows=[1], image_transform=dict(type='x'))
OTHER = dict(type='vlmtune.data.SupervisedDataset', rows=[2], cache_dir='own')
MIXED = dict(type=MixedDataset, planning_workers=3, datasets=[ONE, dict(OTHER, planning_workers=0)])


def test_members_get_what_a_mixture_hands_on_and_what_they_say_themselves():
    first, second = members(MIXED, cache_dir='plans')
    assert (first['rows'], first['cache_dir'], first['planning_workers']) == ([1], 'plans', 3)
    assert (second['rows'], second['cache_dir'], second['planning_workers']) == ([2], 'own', 0)
    assert list(members(OTHER, cache_dir='plans')) == [OTHER]
    assert list(members(ONE)) == [ONE]


@pytest.mark.parametrize('kind', [StreamingDataset, MixedDataset])
def test_what_cannot_be_a_member_is_refused(kind):
    with pytest.raises(ConfigError, match=f'{kind.__name__} cannot be read by themselves; expected a SupervisedD'):
        list(members(dict(type=MixedDataset, datasets=[dict(type=kind, datasets=[ONE])])))


def test_pictures_of_urls_lie_beside_the_plans(tmp_path):
    (settings,) = members({**ONE, 'url_hosts': ('here.org',)}, cache_dir=str(tmp_path / 'plans'))
    assert open_rows(settings) == ([1], ImageRoot(None, ('here.org',), tmp_path / 'images'))
    assert open_rows(dict(rows=dict(type=lambda: [5]), image_folder=tmp_path)) == ([5], tmp_path)
    with pytest.raises(ConfigError, match='set plan_cache_dir'):
        open_rows({**settings, 'cache_dir': None})


def test_without_augmentation_nowhere_is_any():
    assert 'image_transform' not in str(without_augmentation(MIXED))
    assert 'image_transform' in ONE
