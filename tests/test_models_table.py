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
    text = tool.PAGE.read_text(encoding='utf-8')
    assert tool.page(text) == text, 'run `make models`'


def test_only_what_has_a_case_of_the_family_is_called_tested(tool):
    claim = tool.Claim('x', 'shown', ('a.py::test_a', 'b.py::test_b'))
    collected = {'a.py::test_a': {'llama', 'lora'}, 'b.py::test_b': {'qwen2'}}
    assert tool.is_shown(claim, 'llama', collected)
    assert tool.is_shown(claim, 'qwen2', collected)
    assert not tool.is_shown(claim, 'qwen2_vl', collected)


def test_a_claim_whose_test_is_gone_is_no_claim(tool):
    claim = tool.Claim('x', 'shown', ('a.py::test_a', 'b.py::test_b'))
    with pytest.raises(SystemExit, match=r"b\.py::test_b, which shows 'x', does not exist"):
        tool.is_shown(claim, 'llama', {'a.py::test_a': {'llama'}})


def test_a_page_without_a_place_for_a_table_is_told(tool, monkeypatch):
    monkeypatch.setattr(tool, 'collect_tests', lambda: {test: set() for claim in tool.CLAIMS for test in claim.tests})
    with pytest.raises(SystemExit, match=r'models\.md has no place for abilities'):
        tool.page('# Models\n')
