"""report: what a run has written, on one harmless page."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlmtune.apps.report import report
from vlmtune.apps.report.differences import differences
from vlmtune.apps.report.run_files import image_folders, read_runs, settings_of
from vlmtune.apps.report.svg import Line, averaged, plot, ticks
from vlmtune.cli import main
from vlmtune.testing.tiny_runs import tiny_prediction, tiny_step, write_lines, write_tiny_run
from vlmtune.utils.errors import UserError

VOID = {'meta', 'img', 'link', 'input'}
NASTY = '</div></title><script>alert(1)</script><img src=x onerror=alert(1)> & "quoted" \' {{x}} $title \ud800\x00'
SHOWN = NASTY.replace('\ud800', '\ufffd').replace('\x00', '\ufffd')


class Page(HTMLParser):
    """Elements as [tag, attributes, text inside, classes of what is around]; every one is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ''])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ''])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, kind=None):
        return [e for e in self.elements if e[0] == tag and (kind is None or kind in e[1].get('class', '').split())]

    def section(self, name):
        return next((text for _, attributes, text in self.all('section') if attributes['id'] == name), None)


def page_of(*folders, **options):
    out = Path(folders[0]).with_name('page.html')
    report([str(folder) for folder in folders], out=str(out), **options)
    return Page(out.read_text('utf-8'))


@pytest.fixture
def run(tmp_path):
    return write_tiny_run(tmp_path / 'alpha')


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


def test_failures_come_first_and_show_what_is_wrong(run):
    page = page_of(run)
    cards = [e for e in page.all('article', 'card') if 'test.jsonl' in e[2]]
    assert [text[:12] for _, _, text in cards if text] != []
    assert [re.search(r'test\.jsonl:(\d)', text)[1] for _, _, text in cards] == ['3', '2', '1']
    assert [attributes['class'] for _, attributes, _ in cards] == ['card wrong', 'card wrong', 'card right']
    assert 'cut off at max_new_tokens' in cards[0][2]
    assert 'anls 0.7, 3 tokens in 0.35 s' in cards[1][2]
    assert '3 questions, 2 not answered perfectly (anls); the worst first' in page.section('answers')
    assert [text for _, _, text in page.all('ins')[1:]] == ['nothing', ' grey']
    assert [text for _, _, text in page.all('del')[1:]] == ['a blue square', ' green']


def test_as_many_answers_as_asked_for(run):
    page = page_of(run, count=1)
    assert '1 of them, the worst first' in page.section('answers')
    assert re.findall(r'test\.jsonl:\d', page.section('answers')) == ['test.jsonl:3']


@pytest.mark.parametrize(
    ('scores', 'order'),
    [
        ([{'cer': 0.1}, {'cer': 0.0}, {'cer': 1.4}], '312'),  # less is better
        ([{'bleu': 55.0}, {'bleu': 100.0}, {'bleu': 0.0}], '312'),  # on a scale to 100
        ([{}, {}, {}], '213'),  # compared with the references; row 1 and 3 are equal to theirs
        ([{'a': 1.0, 'b': 0.0}, {'a': 0.0, 'b': 1.0}, {'a': 0.5, 'b': 1.0}], '231'),  # the first counts
    ],
)
def test_what_a_failure_is(tmp_path, scores, order):
    answers = [tiny_prediction(i, 'x', 'y' if i == 1 else 'x', scores=score) for i, score in enumerate(scores)]
    write_lines(tmp_path / 'run/test/base/predictions.jsonl', answers)
    page = page_of(tmp_path / 'run')
    assert ''.join(re.findall(r'test\.jsonl:(\d)', page.section('answers'))) == order
    assert page.section('training') is None


def test_a_resumed_run_is_one_run(run):
    """Killed after 60 steps, resumed from 40, ended at 50: 41 to 60 of the first start do not count."""
    write_lines(run / '20260102_000000/metrics.jsonl', [tiny_step(i, loss=77.0) for i in range(41, 51)])
    with (run / 'validation.jsonl').open('a') as file:
        file.write('{"iteration": 60, "cer": 9.0}\n{"iteration": 40, "cer": 8.0}\n')
    with (run / 'evaluate_chat.jsonl').open('a') as file:
        file.write(json.dumps(dict(iteration=40, input='What is it?', images=[], answer='new question')) + '\n')
        for answer in ('anew', 'once more'):
            file.write(json.dumps(dict(iteration=40, input='new', images=[], answer=answer)) + '\n')
    (found,) = read_runs([str(run)])
    assert found.series('loss') == [(i, 6 / i) for i in range(1, 41)] + [(i, 77.0) for i in range(41, 51)]
    assert found.validation_series('cer') == [(20, 0.05), (40, 8.0)]
    answers = [(row['iteration'], row['answer']) for row in found.chats]
    assert answers == [(0, 'answer 0'), (20, 'answer 20'), (40, 'answer 40'), (40, 'new question'), (40, 'once more')]
    assert 'started2 times' in page_of(run).section('overview')


def test_broken_files_are_told_and_left_out(run):
    log = run / '20260101_000000'
    with (log / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 61, "loss": NaN, "lr": "x"}\n[1]\n{"step": "62"}\n{"st')
    (log / 'parts.json').write_text('{')
    (log / 'config.py').write_text('lr = (')
    (run / 'evaluate_chat.jsonl').write_bytes(b'\xff\xfe\n' + b'[' * 100000 + b'\n')
    (found,) = read_runs([str(run)])
    assert [row['step'] for row in found.steps] == list(range(1, 62))
    assert found.series('loss')[-1][0] == found.series('lr')[-1][0] == 60
    page = page_of(run)
    notes = [text for _, _, text in page.all('p', 'trouble')]
    assert notes[:2] == [
        '20260101_000000/metrics.jsonl: 3 lines could not be read',
        'evaluate_chat.jsonl: 2 lines could not be read',
    ]
    assert page.section('parts') is None


@pytest.mark.parametrize('sizes', [5, [5], [[5]], [['a', 'b']], [[None, 3]], {'a': 1}, 'x', [[1, 2, 3]], [[1e999, 1]]])
def test_a_prediction_of_sizes_that_are_none_is_told_and_left_out(tmp_path, sizes):
    answers = [tiny_prediction(0, 'x', 'x'), tiny_prediction(1, 'y', 'y', image_sizes=sizes)]
    write_lines(tmp_path / 'run/test/base/predictions.jsonl', answers)
    page = page_of(tmp_path / 'run')
    assert re.findall(r'test\.jsonl:\d', page.section('answers')) == ['test.jsonl:1']
    assert 'test/base/predictions.jsonl: 1 line could not be read' in page.section('overview')


def test_a_number_that_cannot_be_drawn_is_left_out(run):
    write_lines(run / 'validation.jsonl', [dict(iteration=i, cer=10**400 if i == 2 else 0.5) for i in (1, 2, 10**400)])
    (found,) = read_runs([str(run)])
    assert found.validation_series('cer') == [(1, 0.5)]
    assert page_of(run).section('validation')


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


def test_a_score_counts_errors_if_the_run_says_so(run):
    told = dict(mine='less', cer='greater')
    rows = [dict(iteration=i, mine=value, cer=value, rules=told) for i, value in ((10, 0.25), (20, 0.75))]
    write_lines(run / 'validation.jsonl', rows)
    answers = [tiny_prediction(i, 'x', 'y', scores=dict(mine=value)) for i, value in enumerate((0.0, 0.5))]
    write_lines(run / 'test/iter_60/predictions.jsonl', answers)
    page = page_of(run)
    assert 'best validation mine0.25 at step 10' in page.section('overview')
    assert 'best validation cer0.75 at step 20' in page.section('overview')
    assert re.findall(r'test\.jsonl:\d', page.section('answers')) == ['test.jsonl:2', 'test.jsonl:1']


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


def test_before_and_after_stand_together(run):
    write_lines(run / 'test/base/predictions.jsonl', [tiny_prediction(0, 'no', 'a red square', scores={'anls': 0.0})])
    page = page_of(run)
    (card,) = [text for _, _, text in page.all('article', 'card') if 'test.jsonl:1' in text]
    assert card.index('test/base') < card.index('test/iter_60')
    assert '3 questions, 2 not answered perfectly by test/iter_60 (anls)' in page.section('answers')
    assert [attributes['class'] for _, attributes, _ in page.all('article')][1:] == ['card wrong'] * 2 + ['card right']


def test_validation_answers_are_shown_where_there_was_no_test(run):
    for path in (run / 'test/iter_60').iterdir():
        path.unlink()
    for i in (9, 10):
        answers = [tiny_prediction(0, f'said after {i}', 'x')]
        write_lines(run / f'validation/iter_{i}/predictions.jsonl', answers)
    answers = page_of(run).section('answers')
    assert 'said after 10' in answers
    assert 'said after 9' not in answers


def test_pictures_are_found_missed_and_limited(run, monkeypatch):
    page = page_of(run)
    assert len(page.all('img')) == 1 + 3  # named in full by a sample answer, in the image folder by the test
    captions = [text for _, _, text in page.all('figcaption') if '.png' in text]
    assert captions == ['0.png', '2.png, 600 x 300', '1.png, 500 x 300', '0.png, 400 x 300']
    (run.parent / 'pictures/2.png').unlink()
    troubles = [text for _, _, text in page_of(run).all('p', 'trouble')]
    assert len(troubles) == 1
    assert '2.png' in troubles[0]
    monkeypatch.setattr('vlmtune.apps.report.BUDGET', 2000)
    page = page_of(run)
    assert sum(len(attributes['src']) for _, attributes, _ in page.all('img')) <= 2000
    assert 'left out: the page has grown to its limit' in [text for _, _, text in page.all('p', 'trouble')]


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


def test_a_config_is_read_and_never_run(tmp_path):
    config = f"""
import os
open({str(tmp_path / 'ran')!r}, 'w')
a = dict(b=dict(image_folder='second'), c=[1, 2])
test_dataloader = dict(dataset=dict(image_folder='first'))
x = dict(image_folder=open({str(tmp_path / 'ran')!r}, 'w'))
y = z = dict(**a)
"""
    assert image_folders(config) == ['first', 'second']
    assert settings_of(config)['a.c'] == '[1, 2]'
    assert not (tmp_path / 'ran').exists()


def test_differences():
    def marked(answer, *references):
        marks = {'same': '{}', 'extra': '+{}+', 'missing': '-{}-'}
        return ''.join(marks[piece.kind].format(piece.text) for piece in differences(answer, references))

    assert marked('a blue square', 'a blue square') == 'a blue square'
    assert marked('a grey square.', 'a green square') == 'a- green-+ grey+ square+.+'
    assert marked('红色方块', '绿色方块') == '-绿-+红+色方块'
    assert marked('two', 'one', 'two') == 'two'
    assert marked('free') == 'free'
    assert marked('', 'x') == '-x-'


def test_no_spike_is_lost_and_lines_are_short():
    points = [(i, 1.0) for i in range(20000)]
    points[12345] = (12345, 50.0)
    svg = plot([Line(points)], label='x')
    places = re.findall(r'[ML]([\d.]+) ([\d.]+)', re.search(r'class="line c0" d="([^"]+)', svg)[1])
    assert len(places) <= 303
    assert min(float(y) for _, y in places) < 20
    assert plot([Line([])], label='x') == ''
    assert 'NaN' not in plot([Line([(3, 0.0)])], label='one point') + plot([Line([(1, -2.0), (2, -2.0)])], label='flat')


def test_means_keep_to_the_middle():
    line = [(float(i), float(i)) for i in range(50)]
    assert averaged(line, window=11) == line
    assert averaged([(0, 0.0), (1, 9.0), (2, 0.0)], window=3) == [(0, 0.0), (1, 3.0), (2, 0.0)]


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 100, [20, 40, 60, 80, 100]), (3, 3, [3]), (-1e-5, 1e-5, [-1e-5, 0, 1e-5])],
)
def test_numbers_beside_an_axis_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-12) or len(expected) == 3
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in ticks(low, high))
