import pytest

from vlmtune.config import parse_cfg_options
from vlmtune.utils.errors import ConfigError


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1e-5', 1e-5),
        ('[1,2]', [1, 2]),
        ('[a.jpg,b 1.jpg]', ['a.jpg', 'b 1.jpg']),
        ('[a, true, 2,]', ['a', True, 2]),
        ('[2024] rows.json', '[2024] rows.json'),
        ('1,2', (1, 2)),
        ('(0.9, 0.95)', (0.9, 0.95)),
        ('full', 'full'),
        ('None', None),
        ('False', False),
        ('true', True),
        ("'None'", 'None'),
        ('-1', -1),
        ("{'llm': 'full'}", {'llm': 'full'}),
        ("dict(llm='full', n=[dict(a=1)])", {'llm': 'full', 'n': [{'a': 1}]}),
        ('dict(**x)', 'dict(**x)'),
        ('a=b', 'a=b'),
        ('', ''),
        ('data/x.json', 'data/x.json'),
        ('meta-llama/Llama 3', 'meta-llama/Llama 3'),
        ('007', '007'),
        ('__import__("os").system("true")', '__import__("os").system("true")'),
    ],
)
def test_values_are_literals_or_else_text(text, value):
    assert parse_cfg_options([f'a.b={text}']) == {'a.b': value}
    assert type(parse_cfg_options([f'a.b={text}'])['a.b']) is type(value)


def test_wrong_options_are_listed_together():
    with pytest.raises(ConfigError) as failure:
        parse_cfg_options(['lr', '=3', 'a b=1', 'x=1', 'x=2', "y=[a, 'b]"])
    message = str(failure.value)
    assert message.startswith('5 mistakes')
    assert "expected key=value, such as lr=1e-5 or tune.llm=full, got 'lr'" in message
    assert "'x' is given twice" in message
    assert "y: expected a list such as ['a.jpg', 'b.jpg'], got [a, 'b]" in message
