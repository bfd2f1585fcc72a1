"""Every packed run checks itself before its first step; others have nothing to check."""

import pytest
import torch

from vlmtune.data import Collator
from vlmtune.utils.errors import TrainingError

SHORT = dict(max_steps=1, max_epochs=None)
LINE = 'packed samples do not see each other: llm sdpa, sample by sample; vision_encoder sdpa; largest change 0.0e+00'


def test_a_packed_run_says_that_its_samples_are_apart(run, caplog):
    with caplog.at_level('INFO', logger='vlmtune'):
        run('done', pack_to_max_length=True, **SHORT)
    assert caplog.text.count(LINE) == 1


def test_a_run_without_packs_has_no_check(run, caplog):
    with caplog.at_level('INFO', logger='vlmtune'):
        run('done', pack_to_max_length=False, **SHORT)
    assert 'do not see each other' not in caplog.text


def test_a_leak_stops_the_run_before_its_first_step(run, tmp_path, monkeypatch):
    """The collator is made to number the tokens of a row from 0 to its end."""
    join = Collator._join

    def leaking(samples):
        batch = join(samples)
        return {**batch, 'position_ids': torch.arange(batch['input_ids'].shape[1])[None]}

    monkeypatch.setattr(Collator, '_join', staticmethod(leaking))
    with pytest.raises(TrainingError, match='packed samples see each other .* set pack_to_max_length=False meanwhile'):
        run('leaks', pack_to_max_length=True, save_steps=1, **SHORT)
    assert not list((tmp_path / 'leaks').glob('iter_*'))


def test_the_check_changes_nothing_of_the_run(run, contents, differences, monkeypatch):
    from vlmtune.engine import runner

    settings = dict(pack_to_max_length=True, max_steps=2, max_epochs=None)
    checked = contents(run('checked', **settings) / 'iter_2.pth')
    monkeypatch.setattr(runner, 'IsolationHook', runner.IsolationHook.__mro__[1])  # mmengine's Hook: does nothing
    unchecked = contents(run('unchecked', **settings) / 'iter_2.pth')
    assert differences(checked, unchecked) == []
