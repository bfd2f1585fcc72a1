"""What the documentation says is what the program does: commands parse, rows are read, configs load, programs run."""

import json
import re

import pytest

from tests.docs.pages import PAGES, ROOT, blocks, commands
from vlmtune import data
from vlmtune.cli import build_parser

LINK = re.compile(r'\]\((?P<path>[^)#:\s]*)(?:#(?P<anchor>[^)\s]*))?\)')
FORMATS = re.compile(r'`(\w+_map_fn)`')


def anchors(text):
    """The names under which a page's headings can be linked."""
    for heading in re.findall(r'^#+ (.+)$', re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S), re.MULTILINE):
        yield re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = re.sub(r'^```.*?^```$', '', page.read_text('utf-8'), flags=re.M | re.S)
    for match in LINK.finditer(text):
        target = (page.parent / match['path']).resolve() if match['path'] else page
        assert target.exists(), match[0]
        if match['anchor'] and target.suffix == '.md':
            assert match['anchor'] in set(anchors(target.read_text('utf-8'))), match[0]


def test_every_page_of_docs_is_listed_in_the_readme():
    readme = (ROOT / 'README.md').read_text('utf-8')
    assert [page.name for page in (ROOT / 'docs').glob('*.md') if f'docs/{page.name}' not in readme] == []


def wrong_commands(found, capsys):
    for where, words in found:
        try:
            build_parser().parse_args(words)
        except SystemExit as error:
            message = capsys.readouterr().err
            is_whole = ':' in where  # in running text, a verb may stand without its arguments
            if error.code and (is_whole or not ('are required' in message or 'expected one argument' in message)):
                yield f'{where}: vlmtune {" ".join(words)}: {message}'


def test_every_command_line_of_the_pages_is_understood(capsys):
    assert list(wrong_commands(commands(), capsys)) == []
    assert len(commands()) > 50


def test_a_command_that_is_out_of_date_would_be_noticed(capsys):
    assert list(wrong_commands([('page.md:1', ['train', 'x.py', '--no-such-option'])], capsys))
    assert list(wrong_commands([('page.md', ['trian'])], capsys))


def map_function_of(block):
    """The one that is named before a row, or the one that the form of a training row asks for."""
    forms = {'messages': 'openai_map_fn', 'conversations': 'llava_map_fn'}
    named = [name for name in FORMATS.findall(block.before) if hasattr(data, name)]
    return next(iter([*named, *(forms[key] for key in json.loads(block.text) if key in forms)]), None)


ROWS = [block for block in blocks('json') if map_function_of(block)]


@pytest.mark.parametrize('block', ROWS, ids=lambda block: block.id)
def test_every_row_of_the_pages_is_read_by_the_map_function_that_is_named_before_it(block):
    row = json.loads(block.text)
    options = dict(boxes='pixel') if 'objects' in row else {}
    assert getattr(data, map_function_of(block))(row, **options).messages


def test_only_what_is_no_training_row_is_not_read():
    others = [block for block in blocks('json') if block not in ROWS]
    assert sorted(block.page for block in others) == ['docs/data.md', 'docs/food_qa.md']  # a bad sample, a raw data set
    assert len(ROWS) >= 9


@pytest.mark.parametrize(
    'block', [block for block in blocks() if re.match('(jsonl|csv) ', block.info)], ids=lambda block: block.id
)
def test_every_file_of_rows_of_the_pages_is_read_by_the_map_function_that_it_names(block, tmp_path):
    ending, function = block.info.split()
    file = tmp_path / f'rows.{ending}'
    file.write_text(block.text, 'utf-8')
    rows = data.load_rows(str(file))
    assert len(rows) >= 2
    assert all(getattr(data, function)(rows[i]).messages for i in range(len(rows)))


def shape_of(name):
    """What two languages of one page share: its commands without their comments, its links, its headings' levels."""
    text = (ROOT / name).read_text('utf-8')
    fences = [re.sub(r' *#.*', '', block.text) for block in blocks() if block.page == name]
    prose = re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)
    links = [match['path'] for match in LINK.finditer(prose) if not match['path'].startswith('README')]
    return fences, links, re.findall(r'^#+', prose, re.MULTILINE), prose.count('\n| ')


def test_both_readmes_say_the_same():
    assert shape_of('README.md') == shape_of('README_zh-CN.md')
