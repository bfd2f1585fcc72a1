"""A chat template comes with a model, so it is a stranger's program. It can neither reach out nor run on."""

import json
import resource
import shutil
import time

import pytest

from vlmtune.apps.chat import chat
from vlmtune.apps.data.check_data import check_data
from vlmtune.data import Processor
from vlmtune.structures import Conversation, Message, TextPart
from vlmtune.utils.errors import DataError

DOUBLED = '{% set x = "ab" %}' + '{% set x = x ~ x %}' * 45 + '{{ x }}'
ADDED = '{% set x = "ab" %}' + '{% set x = x + x %}' * 45 + '{{ x }}'
NESTED = '{% set x = [1] %}' + '{% set x = [x, x] %}' * 45
NAMESPACE = '{% set n = namespace(x="ab") %}' + '{% set n.x = n.x ~ n.x %}' * 45
LOOP = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'

ENDLESS = {
    'three loops': f'{{% for c in range(99999) %}}{LOOP}{{% endfor %}}',
    'loop with a test': '{% for a in range(99999) if range(99999)|list|length < 0 %}{% endfor %}',
    'filters that loop': '{% for a in range(99999) %}{{ range(99999)|map("string")|list|length }}{% endfor %}',
    'a macro that calls itself twice': '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}'
    '{{ f(60) }}',
    'a macro that calls itself': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    'a recursive loop': '{% set x = [1] %}{% for i in x recursive %}{{ loop(x) }}{{ loop(x) }}{% endfor %}',
    'a literal in a loop': '{% for a in range(99999) %}' + 'x' * 99999 + '{% endfor %}',
    'a variable in a loop': '{% set x = "x" * 99999 %}{% for a in range(99999) %}{{ x }}{% endfor %}',
    'a block set in a loop': '{% set x = "x" * 99999 %}'
    '{% for a in range(99999) %}{% set y %}{{ x }}{% endset %}{% endfor %}',
    'multiplied text': '{{ "x" * 10**11 }}',
    'multiplied list': '{{ [1] * 10**11 }}',
    'doubled text': DOUBLED,
    'added text': ADDED,
    'text in a namespace': NAMESPACE,
    'nested lists printed': NESTED + '{{ x }}',
    'nested lists joined': NESTED + '{{ "" ~ x }}',
    'nested lists as json': NESTED + '{{ x|tojson }}',
    'nested lists as text': NESTED + '{{ x|string }}',
    'nested lists compared': NESTED + NESTED.replace('x', 'y') + '{{ x == y }}',
    'nested dicts': '{% set x = {"a": 1} %}' + '{% set x = {"a": x, "b": x} %}' * 45 + '{{ x }}',
    'nested by dict()': '{% set x = dict(a=1) %}' + '{% set x = dict(a=x, b=x) %}' * 45 + '{{ x }}',
    'doubled list': '{% set x = [1] %}' + '{% set x = x + x %}' * 45,
    'a power': '{{ 10 ** 10 ** 10 }}',
    'powers of powers': '{% set x = 9 ** 999 %}' + '{% set x = x ** 999 %}' * 5,
    'squares': '{% set x = 999999 %}' + '{% set x = x * x %}' * 40,
    'padding': '{{ "x".ljust(10**11) }}',
    'padding by keyword': '{{ "x".zfill(width=10**11) }}{{ "x".center(10**11) }}',
    'tabs': '{{ "\\t".expandtabs(10**11) }}',
    'the filter center': '{{ "x"|center(10**11) }}',
    'indentation': '{{ [1, [2]]|tojson(indent=10**10) }}{{ ("x\\n" * 9999)|indent(10**9) }}',
    'a wide format': '{{ "%99999999999d" % 1 }}',
    'the filter format': '{{ "%99999999999d"|format(1) }}',
    'a wide str.format': '{{ "{:99999999999}".format(1) }}',
    'a width from an argument': '{{ "%*d" % (99999999999, 1) }}{{ "{:{}}".format(1, 99999999999) }}',
    'replaced': '{% set x = "x" * 99999 %}{{ x.replace("x", x) }}',
    'the filter replace': '{% set x = "x" * 99999 %}{{ x|replace("x", x) }}',
    'replaced between letters': '{% set x = "x" * 99999 %}{{ x.replace("", x) }}',
    'joined': '{% set x = "x" * 99999 %}{{ x.join([x] * 99999) }}',
    'the filter join': '{% set x = "x" * 99999 %}{{ [1] * 99999|join(x) }}{{ (["1"] * 99999)|join(x) }}',
    'lorem ipsum': '{{ lipsum(n=10**9) }}',
    'a long list': '{{ range(99999)|list * 99999 }}',
    'nested brackets': '{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}',
    'a long template': '{# ' + 'x' * 2_000_000 + ' #}',
}  # fmt: skip

REACHING = {
    'classes': '{{ "".__class__.__mro__[1].__subclasses__() }}',
    'attr': '{{ (""|attr("__class__")).mro() }}',
    'map': '{{ [""]|map(attribute="__class__")|list }}{{ ([""]|map(attribute="__class__")|first).mro() }}',
    'globals of a function': '{{ raise_exception.__globals__["os"].system("touch MARK") }}',
    'the environment': '{{ self._TemplateReference__context.environment.call_binop }}'
    '{{ cycler.__init__.__globals__.os.system("touch MARK") }}',
    'the allowance': '{{ environment.allow(10**12) }}',
    'format': '{{ "{0.__class__.__init__.__globals__}".format(namespace) }}{{ "{0.__class__.mro}".format("")() }}',
    'include': '{% include "/etc/passwd" %}',
    'import': '{% import "os" as os %}{{ os.system("touch MARK") }}',
    'joined by the names of ours': '{% set __add = 1 %}{% set __join = 1 %}' + DOUBLED,
}  # fmt: skip


def converse(processor):
    talk = Conversation((Message('user', (TextPart('hello'),)), Message('assistant', (TextPart('hi'),))))
    return processor.tokenize(talk)


@pytest.fixture(scope='module')
def processor(tiny_model):
    return Processor(str(tiny_model('qwen2')))


@pytest.mark.parametrize('template', [*ENDLESS.values(), *REACHING.values()], ids=[*ENDLESS, *REACHING])
def test_a_template_ends_soon_small_and_alone(template, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processor.tokenizer, 'chat_template', template)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        converse(processor)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_the_allowance_grows_with_the_conversation(processor):
    """A million characters in a thousand turns, through the template of the model."""
    turns = [Message('user' if i % 2 == 0 else 'assistant', (TextPart('word ' * 200),)) for i in range(1000)]
    began = time.process_time()
    assert len(processor.tokenize(Conversation(tuple(turns))).input_ids) > 100_000
    assert time.process_time() - began < 30


@pytest.fixture
def poisoned(tiny_model, tmp_path):
    """A model whose template shows nothing suspicious until the second question."""
    folder = shutil.copytree(tiny_model('qwen2'), tmp_path / 'model')
    harmless = Processor(str(folder)).tokenizer.chat_template
    template = '{% if messages[0].content == "now" %}' + LOOP + '{% endif %}' + harmless
    (folder / 'chat_template.jinja').write_text(template)
    return folder


def test_a_template_that_waits_for_its_word(poisoned, recipe, bounded, refused, tmp_path, capsys):
    """Through ``vlmtune check-data`` and ``vlmtune chat``: one row is bad, the other is not."""
    rows = [dict(conversations=[{'from': 'human', 'value': w}, {'from': 'gpt', 'value': 'y'}]) for w in ('now', 'ok')]
    (tmp_path / 'two.json').write_text(json.dumps(rows))
    with bounded():
        assert check_data(recipe(model=poisoned, data=tmp_path / 'two.json'), as_json=True) == 1
    assert capsys.readouterr().out.count('more than a conversation of this length needs') == 1
    with refused('more than a conversation of this length needs', DataError):
        chat(str(poisoned), prompt='now')
