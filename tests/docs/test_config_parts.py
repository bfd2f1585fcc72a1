"""Every part of a config that the pages show loads in a recipe, without one mistake."""

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from vlmtune.apps.train import prepare_config
from vlmtune.config.mistakes import ConfigMistakes

RECIPES = {path.stem: path for path in (ROOT / 'configs').glob('*/*.py')}
DEFAULT = 'qwen2_5_vl_3b_lora_vqa'
PARTS = [block for block in blocks() if re.fullmatch(r'python( recipe=\w+)?', block.info)]


def assigned(node):
    """The name that a statement gives a value to, if it is a plain one."""
    is_plain = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    return node.targets[0].id if is_plain else None


def put_into(recipe, part):
    """The recipe with a part of a page: its names get the page's values, new ones come before or at the end."""
    lines = recipe.splitlines(keepends=True)
    places = {assigned(node): node for node in ast.parse(recipe).body}
    imports, new, first = [], [], len(lines)
    for node in ast.parse(part).body:
        text = ast.get_source_segment(part, node) + '\n'
        place = places.get(assigned(node)) if assigned(node) else None
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(text)
        elif place is None:
            new.append(text)
        else:
            lines[place.lineno - 1 : place.end_lineno] = [text, *[''] * (place.end_lineno - place.lineno)]
            first = min(first, place.lineno - 1)
    at = next(i for i, line in enumerate(lines) if line.startswith('from torch.optim'))
    return ''.join([*lines[:at], *imports, *lines[at:first], *new, *lines[first:]])


def load(block, folder):
    name = (re.findall(r'recipe=(\w+)', block.info) or [DEFAULT])[0]
    for other in blocks():
        title = re.fullmatch(r'python title=(\w+\.py)', other.info)
        if other.page == block.page and title and f'from {title[1][:-3]} import' in block.text:
            (folder / title[1]).write_text(other.text)
    recipe = folder / f'{name}.py'
    recipe.write_text(put_into(RECIPES[name].read_text('utf-8'), block.text))
    return prepare_config(str(recipe), work_dir=str(folder / 'run'))


def mistakes(block, folder):
    """What is wrong with the recipe, apart from settings of its own that the page's part has no use for."""
    try:
        load(block, folder)
    except ConfigMistakes as error:
        unused = [
            (line, re.fullmatch(r".*: setting '(\w+)'; nothing in the file uses it", line)) for line in error.mistakes
        ]
        mine = re.findall(r'^(\w+) =', block.text, re.MULTILINE)
        return [line for line, match in unused if match is None or match[1] in mine]
    return []


@pytest.mark.parametrize('block', PARTS, ids=lambda block: block.id)
def test_a_part_of_a_config_loads_without_a_mistake(block, tmp_path):
    assert mistakes(block, tmp_path) == []


def test_a_name_that_is_out_of_date_would_be_noticed(tmp_path: Path):
    block = PARTS[0]._replace(info='python', text='tune = dict(vision_tower="full")\nno_such_setting = 1\n')
    assert 'no_such_setting' in mistakes(block, tmp_path)[0]
