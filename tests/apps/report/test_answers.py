"""Answers: failures first, with what is wrong in them, and their pictures."""

import re

import pytest

from tests.apps.report.pages import page_of
from vlmtune.testing.tiny_runs import tiny_prediction, write_lines


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
