"""Speed counts what was learned: real and supervised tokens apart, no padding, no fillers."""

import json

import pytest
import torch
from mmengine.config import Config

from vlmtune.apps.train import prepare_config
from vlmtune.engine.build import build_data
from vlmtune.engine.hooks.throughput import peak_memory_mib


def rows_of(work_dir):
    (path,) = work_dir.glob('*/metrics.jsonl')
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(rows, name):
    return sum(row[name] * row['time'] for row in rows)


@pytest.mark.parametrize('settings', [dict(), dict(pack_to_max_length=False, batch_size=4, accumulative_counts=1)])
def test_tokens_of_an_epoch(settings, run, tmp_path):
    """Packed or padded, an epoch has the tokens of its samples."""
    rows = rows_of(run('done', max_epochs=1, **settings))
    cfg = prepare_config(str(tmp_path / 'recipe.py'), overrides=settings)
    assert isinstance(cfg, Config)
    dataset = build_data(cfg)[1].dataset
    assert learned(rows, 'tokens_per_second') == pytest.approx(dataset.lengths.sum())
    assert learned(rows, 'learned_tokens_per_second') == pytest.approx(dataset.supervised.sum())
    assert sum(row['samples'] for row in rows) == len(dataset)


def test_times_and_rates_of_a_step(run):
    for row in rows_of(run('done', max_steps=3, max_epochs=None)):
        split = sum(row[f'{phase}_time'] for phase in ('data', 'vision', 'llm', 'optimizer'))
        assert split == pytest.approx(row['time'])
        assert row['data_time_share'] == pytest.approx(row['data_time'] / row['time'])
        assert min(row['vision_time'], row['llm_time'], row['optimizer_time'], row['tflops']) > 0
        assert row['memory_mib'] > 100


def test_the_peak_is_named_where_it_is_known(run, caplog):
    with caplog.at_level('INFO', 'vlmtune'):
        run('done', max_steps=1, max_epochs=None)
    assert 'no MFU: the peak of this device (cpu) is not known; TFLOP/s is logged' in caplog.text


def test_memory_of_a_process():
    before = peak_memory_mib(torch.device('cpu'))
    block = torch.ones(64 << 18)  # 64 MiB
    assert peak_memory_mib(torch.device('cpu')) >= before
    assert len(block)


def test_no_bar_where_there_is_no_terminal(run, capsys):
    run('done', max_steps=1, max_epochs=None)
    assert 'step/s' not in capsys.readouterr().err
