"""The report in a real Chromium: it shows, asks nobody, complains of nothing, and fits a phone."""

from pathlib import Path

import pytest

from vlmtune.apps.data.browse_page import as_page
from vlmtune.apps.data.shown_samples import ShownPack, ShownSample
from vlmtune.apps.report import report
from vlmtune.data.token_runs import TokenRun
from vlmtune.testing.tiny_runs import tiny_prediction, write_lines, write_tiny_run

pytestmark = pytest.mark.browser

LONG = 'w' * 400


@pytest.fixture(scope='module')
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one with words that no line can hold."""
    folder = tmp_path_factory.mktemp('runs')
    runs = [write_tiny_run(folder / 'first', steps=400), write_tiny_run(folder / 'second', lr=5e-5)]
    row = tiny_prediction(0, f'{LONG} <s>no</s>', LONG, where=LONG, question=LONG, images=['0.png'] * 3)
    write_lines(runs[0] / 'test' / LONG[:100] / 'predictions.jsonl', [row])
    report([str(run) for run in runs], out=str(folder / 'page.html'))
    return folder / 'page.html'


@pytest.mark.parametrize('width', [375, 1280])
def test_it_shows_and_asks_nobody(open_page, page_file, width):
    watched = open_page(page_file.as_uri(), window=dict(width=width, height=800))
    page = watched.page
    assert [url for url in watched.fetched if not url.startswith('data:')] == [page_file.as_uri()]
    assert watched.trouble == []
    assert not watched.is_wider_than_its_window()
    pictures = page.evaluate('[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])')
    assert len(pictures) == 1 + 3 + 3
    assert all(complete and natural and 0 < shown <= width - 64 for complete, natural, shown in pictures)
    plots = page.evaluate('[...document.querySelectorAll("svg")].map(s => [s.clientWidth, s.clientHeight])')
    assert len(plots) >= 10
    assert all(300 <= wide <= width and high > 150 for wide, high in plots)
    colours = page.evaluate('[...document.querySelectorAll("path.line")].map(p => getComputedStyle(p).stroke)')
    assert len(set(colours)) == 2  # one for each run
    assert page.locator('s').count() == 0


def test_right_answers_can_be_hidden(open_page, page_file):
    page = open_page(page_file.as_uri()).page
    right, wrong = page.locator('.card.right'), page.locator('.card.wrong')
    assert (right.count(), wrong.count()) == (1, 3)
    assert right.first.is_visible()
    page.check('#only')
    assert not right.first.is_visible()
    assert wrong.first.is_visible()


def test_it_is_dark_where_the_reader_wants_that(open_page, page_file):
    page = open_page(page_file.as_uri()).page
    colour = 'getComputedStyle(document.body).backgroundColor'
    assert page.evaluate(colour) == 'rgb(255, 255, 255)'
    page.emulate_media(color_scheme='dark')
    assert page.evaluate(colour) == 'rgb(20, 23, 28)'


def test_a_phone_takes_its_own_width(chromium, page_file, tmp_path):
    """Without a viewport of their own, phones lay a page out 980 pixels wide and shrink it."""
    sample = ShownSample(0, LONG, 3, 2, 0, [TokenRun('text', True, 3, LONG)], [])
    (tmp_path / 'browse.html').write_text(as_page([sample], [ShownPack(0, [(0, LONG, 3)], 4)], title=LONG, samples=1))
    context = chromium.new_context(viewport=dict(width=375, height=740), is_mobile=True)
    page = context.new_page()
    for file in (page_file, tmp_path / 'browse.html'):
        page.goto(file.as_uri())
        widths = page.evaluate('[document.documentElement.clientWidth, document.documentElement.scrollWidth]')
        assert widths == [375, 375]
    context.close()
