import subprocess
import sys

import pytest

from vlmtune import recipes
from vlmtune.config.locate import find_base
from vlmtune.recipes import copy_recipe, find_recipe, list_recipes, resolve_config
from vlmtune.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def built_in(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp('configs')
    for name in ('llava/llava_lora', 'llava/llava_qlora', 'qwen/Qwen_lora', 'qwen/_shared'):
        (root / name).parent.mkdir(exist_ok=True)
        (root / f'{name}.py').write_text(f'# {name}\n')
    monkeypatch.setattr(recipes, 'recipe_root', lambda: root)
    return root


def names(pattern=None):
    return [path.stem for path in list_recipes(pattern)]


def test_list_is_sorted_and_leaves_out_private_files():
    assert names() == ['Qwen_lora', 'llava_lora', 'llava_qlora']


def test_pattern_is_a_part_of_the_name_or_a_wildcard():
    assert names('LLAVA') == ['llava_lora', 'llava_qlora']
    assert names('*_lora') == ['Qwen_lora', 'llava_lora']
    assert names('gemma') == []


def test_find_by_name():
    assert find_recipe('llava_lora').name == 'llava_lora.py'
    assert find_recipe('llava_lora.py').name == 'llava_lora.py'
    with pytest.raises(ConfigError, match="no built-in config is named 'llava_loar'; the nearest are llava_lora"):
        find_recipe('llava_loar')
    with pytest.raises(ConfigError, match='`vlmtune list-cfg` lists them'):
        find_recipe('zzz')


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_config('llava_lora.py').parent.name == 'llava'
    (tmp_path / 'llava_lora.py').write_text('')
    (tmp_path / 'llava_qlora').mkdir()  # a folder hides nothing
    assert resolve_config('llava_lora.py').resolve() == tmp_path / 'llava_lora.py'
    assert resolve_config('llava_qlora').parent.name == 'llava'


def test_copy_gives_the_same_bytes_and_overwrites_nothing(tmp_path):
    target = copy_recipe('llava_lora', tmp_path / 'a' / 'b')
    assert target == tmp_path / 'a' / 'b' / 'llava_lora.py'
    assert target.read_bytes() == find_recipe('llava_lora').read_bytes()
    target.write_text('edited')
    with pytest.raises(ConfigError, match='is already there'):
        copy_recipe('llava_lora', tmp_path / 'a' / 'b')
    assert target.read_text() == 'edited'
    with pytest.raises(ConfigError, match='is a file; name a folder'):
        copy_recipe('llava_lora', target)


def test_a_relative_base_of_a_copied_recipe_is_found_among_the_built_in_ones(built_in, tmp_path):
    assert find_base('llava_lora', level=1, beside=tmp_path) == built_in / 'llava' / 'llava_lora.py'
    assert find_base('vlmtune.configs.qwen.Qwen_lora', level=0, beside=tmp_path) is None  # the real root is elsewhere


def test_recipes_need_no_library():
    code = (
        'import sys; from vlmtune.recipes import list_recipes; '
        'assert not {"torch", "mmengine", "numpy"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
