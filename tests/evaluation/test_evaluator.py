"""Metrics as a config names them, over prediction rows."""

import builtins

import pytest

from vlmtune.config import config_mistakes, load_config
from vlmtune.evaluation import Evaluator, cer, exact_match, is_better
from vlmtune.evaluation.metrics import METRICS
from vlmtune.utils.errors import ConfigError

ROWS = [
    dict(prediction='red', references=['red', 'crimson'], question='Which colour?'),
    dict(prediction='Blue', references=['blue'], question='Which colour?'),
    dict(prediction='green', references=[], question='Which colour?'),
]


def test_scores_by_name_and_function_with_options():
    metrics = [dict(type=exact_match), cer, dict(type='exact_match', ignore_case=True, name='any_case')]
    scores = Evaluator(metrics).scores(ROWS)
    assert scores == dict(exact_match=0.5, cer=pytest.approx(1 / 7), any_case=1.0)
    assert list(scores) == ['exact_match', 'cer', 'any_case']


def test_a_row_alone_scores_like_a_corpus_of_one():
    evaluator = Evaluator([exact_match, cer])
    assert evaluator.row_scores(ROWS[1]) == dict(exact_match=0, cer=0.25) == evaluator.scores(ROWS[1:2])
    assert evaluator.row_scores(ROWS[2]) == {}


def test_all_built_in_metrics_that_need_no_image_are_found_by_name():
    names = [name for name in METRICS if name != 'box_iou']
    assert len(names) == 10
    perfect = [dict(prediction='red', references=['red'], question='')] * 2
    scores = Evaluator(names).scores(perfect)
    expected = dict.fromkeys(names, 1.0) | dict(cer=0.0, wer=0.0, bleu=0.0, chrf=100.0)
    assert scores == pytest.approx(expected)  # one word is too short for BLEU, which counts four in a row


def test_a_function_of_ones_own_gets_texts_and_what_it_asks_for():
    def length_ratio(predictions, references, *, samples, processor, unit=1):
        assert predictions == ['red', 'Blue']
        assert references == [['red', 'crimson'], ['blue']]
        assert [row['question'] for row in samples] == ['Which colour?'] * 2
        assert processor == 'the processor'
        return dict(longer=unit, shorter=0)

    plain = Evaluator([dict(type=length_ratio, unit=3)], processor='the processor')
    assert plain.scores(ROWS) == dict(longer=3.0, shorter=0.0)
    named = Evaluator([dict(type=length_ratio, name='mine')], processor='the processor')
    assert named.scores(ROWS) == dict(mine_longer=1.0, mine_shorter=0.0)


OWN_METRIC = """
def short_answers(predictions, references, *, samples, most=1):
    return sum(len(row['prediction'].split()) <= most for row in samples) / len(predictions)
"""
CONFIG = """
from vlmtune.evaluation import cer
from own_metrics import short_answers
val_evaluator = dict(
    metrics=[dict(type=cer), dict(type=short_answers, most=2, name='short')], generation=dict(max_new_tokens=8),
    reference_key=None)
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / 'own_metrics.py').write_text(OWN_METRIC)
    (tmp_path / 'config.py').write_text(CONFIG)
    return str(tmp_path / 'config.py')


def test_a_metric_lies_in_a_file_beside_the_config(config):
    evaluator = Evaluator(**load_config(config, check=config_mistakes).val_evaluator)
    assert evaluator.scores(ROWS) == dict(cer=pytest.approx(1 / 7), short=1.0)
    assert evaluator.generation == dict(max_new_tokens=8)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ({'val_evaluator.metrics.1.mots': 3}, "val_evaluator.metrics.1.mots: unknown argument, did you mean 'most'"),
        ({'val_evaluator.references': 'answers'}, "references.*did you mean 'reference_key'"),
    ],
)
def test_mistakes_are_told_with_the_others_of_the_config(config, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config, override, check=config_mistakes)


def test_without_metrics_there_are_no_scores():
    assert Evaluator().scores(ROWS) == {}
    assert Evaluator(generation=dict(max_new_tokens=4)).generation == dict(max_new_tokens=4)


@pytest.mark.parametrize(
    ('metrics', 'message'),
    [
        (['exact_mach'], "no built-in metric is called 'exact_mach', did you mean 'exact_match'"),
        ([3], 'expected dict'),
        ([dict(type=exact_match, casing=True)], "exact_match.* cannot be called: .*'casing'"),
        (['cer', 'cer'], "two are called 'cer'; give one of them a name"),
    ],
)
def test_what_is_no_metric_is_told_at_once(metrics, message):
    with pytest.raises(ConfigError, match=message):
        Evaluator(metrics)


@pytest.mark.parametrize(
    ('generation', 'message'),
    [
        (dict(max_new_token=5), "generation: .* no setting 'max_new_token', did you mean 'max_new_tokens'"),
        (dict(max_new_tokens='5'), 'generation: '),
    ],
)
def test_generation_settings_that_cannot_be(generation, message):
    with pytest.raises(ConfigError, match=message):
        Evaluator(generation=generation)


@pytest.mark.parametrize(('value', 'message'), [('high', "returned 'high'"), (float('nan'), 'returned nan')])
def test_a_metric_has_to_give_numbers(value, message):
    with pytest.raises(ConfigError, match=f'the metric odd {message}'):
        Evaluator([dict(type=lambda predictions, references: value, name='odd')]).scores(ROWS)


def test_two_metrics_that_give_one_name():
    def odd(predictions, references):
        return dict(cer=1)

    with pytest.raises(ConfigError, match="two give a score 'cer'"):
        Evaluator([odd, cer]).scores(ROWS)


@pytest.mark.parametrize(('key', 'said'), [(None, 'an answer in its last turn'), ('answers', "the key 'answers'")])
def test_rows_without_references_cannot_be_scored(key, said):
    with pytest.raises(ConfigError, match=f'none of 1 rows has {said} to compare with'):
        Evaluator([exact_match], reference_key=key).scores(ROWS[2:])


def test_a_missing_package_is_told_before_anything_runs(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.partition('.')[0] == 'sacrebleu':
            raise ModuleNotFoundError(f'No module named {name!r}', name='sacrebleu')
        return real(name, *rest, **options)

    monkeypatch.setattr('importlib.import_module', without)
    with pytest.raises(ConfigError, match=r"the metric bleu needs .*sacrebleu.*; pip install 'vlmtune\[metrics\]'"):
        Evaluator(['bleu'])


@pytest.mark.parametrize('name', ['loss', 'val/loss', 'cer', 'val/wer', 'pages_cer', 'perplexity'])
def test_less_is_better_of_errors(name):
    assert is_better(name) == 'less'


@pytest.mark.parametrize('name', ['exact_match', 'val/anls', 'box_iou', 'closer', 'val/glossy'])
def test_more_is_better_of_the_rest(name):
    assert is_better(name) == 'greater'
