"""Metrics as a config names them, over prediction rows."""

import builtins
import math

import pytest

from vlmtune.config import config_mistakes, load_config
from vlmtune.evaluation import Evaluator, cer, exact_match
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
    with pytest.raises(ConfigError, match='the metric length_ratio failed'):  # what the config gives is not replaced
        Evaluator([dict(type=length_ratio, processor='another')], processor='the processor').scores(ROWS)
    named = Evaluator([dict(type=length_ratio, name='mine')], processor='the processor')
    assert named.scores(ROWS) == dict(mine_longer=1.0, mine_shorter=0.0)


OWN_METRIC = """
def short_answers(predictions, references, *, samples, most=1):
    return sum(len(row['prediction'].split()) <= most for row in samples) / len(predictions)
"""
CONFIG = """
from vlmtune.evaluation import cer
from metrics_of_this_test import short_answers
val_evaluator = dict(
    metrics=[dict(type=cer), dict(type=short_answers, most=2, name='short')], generation=dict(max_new_tokens=8),
    reference_key=None)
"""


@pytest.fixture(scope='module')  # of two modules of one name the first would hide the second
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('metrics')
    (folder / 'metrics_of_this_test.py').write_text(OWN_METRIC)
    (folder / 'config.py').write_text(CONFIG)
    return str(folder / 'config.py')


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
        (dict(max_new_tokens='5'), "generation: max_new_tokens='5'; expected a positive integer"),
        (dict(stop_strings=['']), "generation.stop_strings holds ''; expected texts"),
        (dict(max_new_tokens=0), 'generation: max_new_tokens=0; expected a positive integer'),
        (dict(do_sample=True, temperature=-1), 'generation: temperature=-1; expected a number above 0'),
        (dict(do_sample=True, temperature='warm'), "generation: temperature='warm'; expected a number above 0"),
        (dict(do_sample=True, top_p=2), 'generation: top_p=2; expected a number above 0 and at most 1'),
        (dict(do_sample=True, top_k=-5), r'generation: top_k=-5; expected 0 \(no limit\) or a positive integer'),
        (dict(do_sample=True, min_p=1.5), 'generation: min_p=1.5; expected a number from 0 to 1'),
        (dict(num_beams=0), 'generation: num_beams=0; expected a positive integer'),
        (dict(eos_token_id=5), 'generation: eos_token_id cannot be set: .* stop_strings'),
        (dict(max_length=50), 'generation: max_length cannot be set: .* max_new_tokens'),
        (dict(num_return_sequences=2), 'generation: num_return_sequences cannot be set: a question has one answer'),
        (dict(return_dict_in_generate=True), 'generation: return_dict_in_generate cannot be set'),
        (dict(repetition_penalty=0), 'generation: repetition_penalty=0; expected a number above 0'),
    ],
)
def test_generation_settings_that_cannot_be(generation, message):
    with pytest.raises(ConfigError, match=message):
        Evaluator(generation=generation)


@pytest.mark.parametrize(('value', 'message'), [('high', "returned 'high'"), (float('nan'), 'returned nan')])
def test_a_metric_has_to_give_numbers(value, message):
    with pytest.raises(ConfigError, match=f'the metric odd {message}'):
        Evaluator([dict(type=lambda predictions, references: value, name='odd')]).scores(ROWS)


def test_generation_settings_at_the_border():
    settings = dict(do_sample=True, temperature=0.1, top_p=1, top_k=0, min_p=0, num_beams=1, repetition_penalty=1)
    assert Evaluator(generation=settings | dict(max_new_tokens=1)).generation['max_new_tokens'] == 1
    assert Evaluator(generation=dict(temperature=None, top_p=None)).generation == dict(temperature=None, top_p=None)


def test_a_metric_that_a_row_gives_nothing_to_score():
    def long_ones(predictions, references):
        counted = [len(text) for text in predictions if len(text) > 3]
        return dict(length=sum(counted)) if counted else {}

    evaluator = Evaluator([exact_match, long_ones])
    assert evaluator.scores(ROWS) == dict(exact_match=0.5, length=4)
    assert evaluator.row_scores(ROWS[0]) == dict(exact_match=1.0)
    with pytest.raises(ConfigError, match='the metric long_ones found nothing to score in any of 1 rows'):
        evaluator.scores(ROWS[:1])


def test_a_metric_that_fails_is_named_with_the_line():
    def boxes(predictions, references, *, samples):
        return samples[0]['boxes']

    with pytest.raises(ConfigError, match=r"^the metric boxes failed: KeyError: 'boxes' \(test_evaluator.py:\d+\)$"):
        Evaluator([boxes]).scores(ROWS)


def test_two_metrics_that_give_one_name():
    def odd(predictions, references):
        return dict(cer=1)

    with pytest.raises(ConfigError, match="two give a score 'cer'"):
        Evaluator([odd, cer]).scores(ROWS)


@pytest.mark.parametrize(('key', 'said'), [(None, 'an answer in its last turn'), ('answers', "the key 'answers'")])
def test_rows_without_references_cannot_be_scored(key, said):
    with pytest.raises(ConfigError, match=f'none of 1 rows has {said} to compare with'):
        Evaluator([exact_match], reference_key=key).scores(ROWS[2:])


def test_rows_that_no_score_counts_are_told(caplog):
    Evaluator([exact_match]).check_references([row['references'] for row in ROWS])
    assert '1 of 3 rows have no reference: they are asked, and left out of the scores' in caplog.text
    caplog.clear()
    Evaluator([exact_match]).check_references([['red']])
    Evaluator().check_references([[], ['red']])  # nothing is scored
    assert not caplog.text


def test_a_missing_package_is_told_before_anything_runs(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.partition('.')[0] == 'sacrebleu':
            raise ModuleNotFoundError(f'No module named {name!r}', name='sacrebleu')
        return real(name, *rest, **options)

    monkeypatch.setattr('importlib.import_module', without)
    with pytest.raises(ConfigError, match=r"the metric bleu needs .*sacrebleu.*; pip install 'vlmtune\[metrics\]'"):
        Evaluator(['bleu'])


def own_error(predictions, references) -> float:
    return 1.0


def several(predictions, references):
    return dict(own_up=1.0, own_down=2.0)


@pytest.mark.parametrize(
    ('metrics', 'name', 'rule'),
    [
        ([], 'loss', 'less'),
        (['cer'], 'cer', 'less'),
        ([dict(type=cer, name='headlines')], 'headlines', 'less'),
        ([dict(type=exact_match, name='cer')], 'cer', 'greater'),
        (['box_iou', 'cer'], 'box_f1', 'greater'),
        (['box_iou', dict(type=several, name='mine', rule='less')], 'mine_own_down', None),
        ([dict(type=several, name='mine', rule='less')], 'mine_own_down', 'less'),
        ([own_error, 'cer'], 'own_error', None),
        ([dict(type=own_error, rule='less')], 'own_error', 'less'),
        (['cer'], 'nothing', None),
    ],
)
def test_which_value_is_better_is_what_the_metric_says_whatever_it_is_called(metrics, name, rule):
    assert Evaluator(metrics).rule_of(name) == rule


def correlation(predictions, references):
    if len(predictions) < 2:
        raise ZeroDivisionError('one point')
    return dict(slope=1.0)


def not_alone(predictions, references):
    return dict(spread=math.nan if len(predictions) < 2 else 3.0, size=1.0)


def test_a_metric_that_has_no_number_for_one_row_is_left_out_of_its_scores():
    evaluator = Evaluator([correlation, not_alone, exact_match])
    assert evaluator.scores(ROWS) == dict(slope=1.0, spread=3.0, size=1.0, exact_match=0.5)
    assert evaluator.row_scores(ROWS[0]) == dict(size=1.0, exact_match=1.0)
    with pytest.raises(ConfigError, match='correlation failed: ZeroDivisionError: one point'):
        evaluator.scores(ROWS[:1])
