import pytest

from vlmtune.apps.chat.system_templates import SYSTEM_TEMPLATES, find_system
from vlmtune.utils.errors import ConfigError, DataError


def test_names_and_words(tmp_path):
    assert find_system() is None
    assert find_system(system='I am {bot_name}, not {name}.', bot_name='Ada') == 'I am Ada, not {name}.'
    (tmp_path / 'system.txt').write_text('Be {bot_name}.', encoding='utf-8')
    assert find_system(system=f'@{tmp_path}/system.txt', bot_name='brief') == 'Be brief.'
    assert len(SYSTEM_TEMPLATES) == 7
    for name in SYSTEM_TEMPLATES:
        assert '{' not in find_system(system_template=name)
    assert 'Ada' in find_system(system_template='coder', bot_name='Ada')


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="laywer does not exist, did you mean 'lawyer'"):
        find_system(system_template='laywer')
    with pytest.raises(ConfigError, match='give one of them'):
        find_system(system='a', system_template='sql')
    with pytest.raises(DataError, match='--system @/no/file: no text can be read'):
        find_system(system='@/no/file')
