"""The best checkpoint by a score of the validation."""

import json
import shutil

import pytest

from vlmtune.utils.errors import ConfigError


def told(*losses):
    given = ', '.join(f'at_{step}={loss}' for step, loss in enumerate(losses, start=1))
    return f'from validation_hooks import Told\ncustom_hooks += [dict(type=Told, {given})]\n'


def records(work_dir):
    return [json.loads(line) for line in (work_dir / 'validation.jsonl').read_text().splitlines()]


def validations(checkpoint):
    return json.loads((checkpoint / 'trainer.json').read_text())['validations']


def saved(work_dir):
    return sorted(int(path.stem[5:]) for path in work_dir.glob('iter_*.pth'))


def test_the_best_checkpoint_stays_and_is_named(validated):
    settings = dict(max_steps=5, max_epochs=None, val_interval=1, save_best='val/loss', save_total_limit=1)
    work_dir = validated('best', more=told(3, 1, 2, 1, 4), save_steps=4, **settings)
    assert saved(work_dir) == [2, 5]
    assert (work_dir / 'best_checkpoint').read_text() == 'iter_2.pth\n'
    assert (work_dir / 'last_checkpoint').read_text() == 'iter_5.pth\n'
    assert json.loads((work_dir / 'iter_2.pth' / 'trainer.json').read_text())['iteration'] == 2  # no save was due


def test_the_rule_may_be_given_and_what_is_not_finite_is_never_best(validated):
    settings = dict(max_steps=4, max_epochs=None, val_interval=1, save_best='val/loss')
    more = told(1, 3, "float('nan')", 2) + "default_hooks.checkpoint.rule = 'greater'\n"
    work_dir = validated('best', more=more, **settings)
    assert (work_dir / 'best_checkpoint').read_text() == 'iter_2.pth\n'
    assert [row['loss'] for row in validations(work_dir / 'iter_4.pth')][:2] == [1, 3]


def test_a_resume_names_the_best_again(validated):
    settings = dict(max_steps=4, max_epochs=None, val_interval=1, save_best='val/loss', save_steps=1)
    work_dir = validated('best', more=told(3, 1, 2, 2), **settings)
    (work_dir / 'best_checkpoint').unlink()
    shutil.rmtree(work_dir / 'iter_4.pth')
    validated('best', more=told(3, 1, 2, 2), resume=True, **settings)
    assert (work_dir / 'best_checkpoint').read_text() == 'iter_2.pth\n'
    assert [row['iteration'] for row in records(work_dir)] == [1, 2, 3, 4]


def test_the_best_may_be_where_a_run_goes_on_in_another_work_dir(validated, contents, differences):
    """It is saved there, with the random generators of the checkpoint, though no step has been learned."""
    settings = dict(max_steps=4, max_epochs=None, val_interval=2, save_best='val/loss', save_steps=2)
    first = validated('first', more=told(0, 1, 0, 2), **settings)
    other = validated('other', more=told(0, 1, 0, 2), resume=str(first / 'iter_2.pth'), **settings)
    assert (other / 'best_checkpoint').read_text() == 'iter_2.pth\n'
    copied, original = (contents(work_dir / 'iter_2.pth') for work_dir in (other, first))
    assert [row['loss'] for row in copied['trainer'].pop('validations')] == [1]
    assert original['trainer'].pop('validations') == []
    assert differences(copied, original) == []
    assert differences(contents(other / 'iter_4.pth'), contents(first / 'iter_4.pth')) == []


SCORES = """
from validation_hooks import lengths
val_evaluator = dict(metrics=[dict(type=lengths, rule='greater')], generation=dict(max_new_tokens=4))
"""


@pytest.mark.parametrize(
    ('settings', 'asked_by'),
    [
        (dict(save_best='val/longest'), 'default_hooks.checkpoint.save_best'),
        (dict(more='custom_hooks += [dict(type=EarlyStoppingHook, monitor="val/longest")]\n'), 'EarlyStoppingHook'),
    ],
)
def test_a_score_of_which_nobody_says_what_is_better(settings, asked_by, validated):
    more = SCORES.replace(", rule='greater'", '') + settings.pop('more', '')
    with pytest.raises(ConfigError, match=f"{asked_by}.*: whether the greater or the less val/longest .* add rule='gr"):
        validated('unsaid', data_path='/no/data.json', more=more, **settings)


@pytest.mark.parametrize(('rule', 'best'), [('less', 1), ('greater', 3)])
def test_the_rule_of_the_metric_says_which_is_the_best(rule, best, validated):
    """Whatever it is called."""
    metric = SCORES.replace('lengths', 'step_number').replace("rule='greater'", f'name="cer", rule="{rule}"')
    work_dir = validated(rule, more=metric, max_steps=3, max_epochs=None, val_interval=1, save_best='val/cer')
    assert (work_dir / 'best_checkpoint').read_text().strip() == f'iter_{best}.pth'


def test_a_score_that_a_metric_turns_out_not_to_give(validated):
    """What a metric of several scores calls them is known once it has run."""
    settings = dict(max_steps=2, max_epochs=None, val_interval=1)
    work_dir = validated('right', more=SCORES, save_best='val/longest', **settings)
    assert (work_dir / 'best_checkpoint').is_file()
    said = "default_hooks.checkpoint.save_best: no score is called 'val/longer'.*there are val/longest, val/loss"
    with pytest.raises(ConfigError, match=said):
        validated('wrong', more=SCORES, save_best='val/longer', **settings)
    stopping = SCORES + 'custom_hooks += [dict(type=EarlyStoppingHook, monitor="val/longer")]\n'
    with pytest.raises(ConfigError, match="EarlyStoppingHook.monitor: no score is called 'val/longer'"):
        validated('early', more=stopping, **settings)
