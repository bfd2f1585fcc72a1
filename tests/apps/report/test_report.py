"""report: what a run has written, on one harmless page."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from tests.apps.report.pages import NASTY, SHOWN, Page, page_of
from vlmtune.apps.report import report
from vlmtune.cli import main
from vlmtune.testing.tiny_runs import tiny_prediction, tiny_step, write_lines, write_tiny_run
from vlmtune.utils.errors import UserError


def test_a_run_on_one_page(run, capsys):
    assert main(['report', str(run)]) == 0
    assert f'report of 1 run written to {run}/report.html' in capsys.readouterr().err
    text = (run / 'report.html').read_text('utf-8')
    page = Page(text)
    names = ['overview', 'training', 'validation', 'sample-answers', 'tests', 'answers', 'parts', 'config']
    assert [attributes['id'] for _, attributes, _ in page.all('section')] == names
    assert [attributes['href'] for _, attributes, _ in page.all('a')] == [f'#{name}' for name in names]
    overview = page.section('overview')
    for fact in ('optimizer steps60', 'samples960', 'best validation cer0.025 at step 40', '0:00:30', '2.00 GiB'):
        assert fact in overview
    titles = re.findall(r'<figcaption><b>([^<]*)', text)
    assert {'Loss', 'Learning rate', 'Tokens per second', 'Peak memory, GiB', 'Seconds per step', 'cer'} <= set(titles)
    assert len(page.all('svg')) == len(titles)
    assert 'anls0.5667' in page.section('tests')
    assert 'up to 512 x 512' in page.section('tests')
    assert 'llmlora76,0961,7920.0001' in page.section('parts')
    assert 'optim_wrapper = dict(optimizer=dict(type=AdamW, lr=0.0001))' in page.section('config')


def test_nothing_is_fetched_and_nothing_runs(run):
    page_of(run)
    text = run.with_name('page.html').read_text('utf-8')
    page = Page(text)
    assert not page.all('script') + page.all('iframe') + page.all('style')[1:]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert 'http' not in text.replace('http-equiv', '')
    assert [attributes['href'] for _, attributes, _ in page.all('link')] == ['data:,']
    assert not re.search(r'url\(|@import', text)
    for _, attributes, _ in page.all('img'):
        head, _, content = attributes['src'].partition(',')
        assert head == 'data:image/jpeg;base64'
        assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) <= 320


def test_text_of_a_run_stays_text(tmp_path):
    name = NASTY.replace('/', '').replace('\ud800', '').replace('\x00', '')
    run = write_tiny_run(tmp_path / name)
    asked = tiny_prediction(
        0, NASTY, NASTY, question=NASTY, where=NASTY, images=[NASTY], scores={NASTY: 0.5}, finish=NASTY
    )
    write_lines(run / 'test' / name / 'predictions.jsonl', [asked])
    (run / 'test' / name / 'metrics.json').write_text(json.dumps({'metrics': {NASTY: 1}, 'speed': [{NASTY: NASTY}]}))
    chat = dict(iteration=0, input=NASTY, images=[NASTY, '<9 bytes>', 'https://example.org/a.png'], answer=NASTY)
    write_lines(run / 'evaluate_chat.jsonl', [chat, chat | dict(iteration=5)])
    write_lines(run / 'validation.jsonl', [{'iteration': 1, NASTY: 1.0}])
    (run / '20260101_000000/parts.json').write_text(json.dumps([{'part': NASTY, NASTY: NASTY}]))
    (run / '20260101_000000/config.py').write_text(f'a = {NASTY[:-2]!r}\n')
    write_lines(run / '20260101_000000/metrics.jsonl', [tiny_step(1, **{NASTY: 1.0})])
    page = page_of(run, write_tiny_run(tmp_path / 'other'))
    assert not page.all('script')
    assert {frozenset(attributes) for _, attributes, _ in page.all('img')} == {frozenset({'src', 'alt'})}
    assert page.all('h1')[0][2] == f'{name}, other'
    assert [text for _, _, text in page.all('div', 'text')].count(SHOWN) == 3 + 3
    for section, times in (('tests', 3), ('parts', 3), ('validation', 1), ('training', 1)):
        assert page.section(section).count(SHOWN if section != 'parts' else '<script>alert(1)') >= times
    assert 'the picture lies inside its row' in page.section('sample-answers')
    assert 'image is a URL' in page.section('sample-answers')


def test_secrets_do_not_leave(run):
    secret = 'hf_' + 'a1B2' * 8
    write_lines(run / 'test/iter_60/predictions.jsonl', [tiny_prediction(0, f'it is {secret}', 'x')])
    page_of(run)
    assert secret not in run.with_name('page.html').read_text('utf-8')


def test_several_runs_are_drawn_over_each_other(tmp_path):
    first = write_tiny_run(tmp_path / 'one' / 'work')
    second = write_tiny_run(tmp_path / 'two' / 'work', lr=5e-5, steps=80)
    page = page_of(first, second)
    assert page.all('h1')[0][2] == 'one/work, two/work'
    differ = page.section('config').split('config of')[0]
    assert re.findall(r'([a-z_.]+)0\.00015e-05', differ.split('two/work', 1)[1]) == ['lr', 'optim_wrapper.optimizer.lr']
    assert 'image_folder' in differ
    assert 'max_length' not in differ
    cards = [text for _, _, text in page.all('article', 'card')]
    assert len(cards) == 2 + 3  # sample answers on pictures of their own; test questions are the same
    assert all(f'{name}/work: test/iter' in card for card in cards[2:] for name in ('one', 'two'))
    text = first.with_name('page.html').read_text('utf-8')
    (rates,) = re.findall(r'aria-label="Learning rate">.*?</svg>', text)
    assert [rates.count(f'class="line c{i}"') for i in range(3)] == [1, 1, 0]


def test_a_run_without_validation_beside_one_that_has_it_draws_no_empty_line(tmp_path):
    first, second = write_tiny_run(tmp_path / 'one'), write_tiny_run(tmp_path / 'two')
    (second / 'validation.jsonl').unlink()
    page_of(first, second)
    drawn = re.findall(r'<path class="[^"]*" d="([^"]*)"', first.with_name('page.html').read_text('utf-8'))
    assert len(drawn) > 10
    assert [d for d in drawn if not re.match(r'M[\d.]+ [\d.]+', d)] == []  # browsers complain of those


def test_the_plain_plot(tmp_path, capsys):
    run = write_tiny_run(tmp_path / r'_a $\frac{$ run')
    out = tmp_path / 'loss.png'
    assert main(['report', str(run), '--png', str(out)]) == 0
    assert Image.open(out).size == (1200, 675)
    assert len(Image.open(out).convert('RGB').getcolors(10**6)) > 10
    assert not (run / 'report.html').exists()
    assert main(['report', str(run), '--png', str(out), '--out', str(tmp_path / 'p.html')]) == 0
    assert (tmp_path / 'p.html').exists()


def test_what_cannot_be_reported_is_one_line(run, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    write_lines(tmp_path / 'untrained/test/base/predictions.jsonl', [tiny_prediction(0, 'x', 'x')])
    for arguments, message in (
        (['nowhere'], r'error: WORK_DIR .*/nowhere: no such folder; expected the work dir of a run'),
        ([str(tmp_path / 'empty')], r'error: WORK_DIR .*/empty: no run has written here; expected metrics.jsonl .*'),
        ([str(run), f'{run}/.'], r'error: .*/alpha is given twice; name each work dir once'),
        ([str(run), '--out', '/nowhere/p.html'], r'error: --out /nowhere/p.html: cannot be written \(.*\)'),
        ([str(run), '--png', '/nowhere/p.png'], r'error: --png /nowhere/p.png: cannot be written \(.*\)'),
        ([str(run), '--png', 'loss.jpg'], r'error: --png loss.jpg: expected a name that ends in .png'),
        ([str(tmp_path / 'untrained'), '--png', 'p.png'], r'error: --png: no loss has been written in these runs'),
    ):
        assert main(['report', *arguments]) == 1
        assert re.fullmatch(message, capsys.readouterr().err.strip())
    with pytest.raises(UserError):
        report(['nowhere'])
