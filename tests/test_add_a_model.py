"""docs/add_a_model.md works: its very text is carried out in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r'^```(?P<kind>python title=(?P<file>\S+)(?P<place>[^\n]*)|sh)\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL
)
ROWS = '_ROWS = (\n'
COPIED = ('vlmtune', 'configs', 'setup.py', 'pyproject.toml', 'tests/conftest.py')


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
    return tmp_path


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob('*.py')}


def carry_out(block: re.Match, root: Path) -> str:
    """Write what a block of the page holds, or run it; returns what was printed."""
    if block['kind'] == 'sh':
        path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
        environment = {**os.environ, 'PATH': path, 'PYTHONPATH': str(root), 'PY_COLORS': '0'}
        command = ['bash', '-ec', block['text']]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout
    path = root / block['file']
    if block['place']:
        assert block['place'] == ' in _ROWS'
        before, start, after = path.read_text(encoding='utf-8').partition(ROWS)
        path.write_text(before + start + block['text'] + after, encoding='utf-8')
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists()
        path.write_text(block['text'], encoding='utf-8')
    return ''


def test_the_page_adds_a_family_by_its_own_steps(copy):
    before = files(copy)
    blocks = list(BLOCK.finditer((ROOT / 'docs' / 'add_a_model.md').read_text(encoding='utf-8')))
    printed = [carry_out(block, copy) for block in blocks]
    new = files(copy) - before
    assert new == {'vlmtune/models/mosaic.py', 'configs/mosaic/mosaic_2b_lora.py', 'tests/models/test_mosaic.py'}
    assert [bool(block['place']) for block in blocks].count(True) == 1  # one row
    assert re.search(r'\b3 passed\b', printed[-1]), printed[-1]
