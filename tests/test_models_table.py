"""docs/models.md says what the families, the recipes and the tests say."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('models_table', ROOT / 'tools' / 'models_table.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_tool_writes(tool):
    tool.main(['--check'])


def test_check_writes_nothing_and_anything_else_is_refused(tool, monkeypatch, tmp_path):
    page = tmp_path / 'models.md'
    page.write_text('old')
    monkeypatch.setattr(tool, 'PAGE', page)
    monkeypatch.setattr(tool, 'page', lambda text: text + ' and new')
    with pytest.raises(SystemExit, match=r'models\.md is not what .*; run `make models`'):
        tool.main(['--check'])
    with pytest.raises(SystemExit, match='2'):
        tool.main(['--chekc'])
    assert page.read_text() == 'old'
    tool.main([])
    assert page.read_text() == 'old and new'


def test_only_what_has_a_case_of_the_family_is_called_tested(tool):
    collected = {'a.py::test_a': {'llama', 'lora'}, 'b.py::test_b': {'qwen2'}}
    assert tool.is_shown(list(collected), 'llama', collected)
    assert tool.is_shown(list(collected), 'qwen2', collected)
    assert not tool.is_shown(list(collected), 'qwen2_vl', collected)


def test_a_claim_whose_test_is_gone_is_no_claim(tool):
    with pytest.raises(SystemExit, match=r'b\.py::test_b does not exist; mend CLAIMS'):
        tool.is_shown(['a.py::test_a', 'b.py::test_b'], 'llama', {'a.py::test_a': {'llama'}})


def test_a_page_without_a_place_for_a_table_is_told(tool, monkeypatch):
    monkeypatch.setattr(
        tool, 'collect_tests', lambda: {test: set() for _, *tests in tool.CLAIMS.values() for test in tests}
    )
    with pytest.raises(SystemExit, match=r'models\.md has no place for abilities'):
        tool.page('# Models\n')
