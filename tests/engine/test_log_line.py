"""One line per logged step, short enough to read."""

import json
import re

import pytest

from vlmtune.engine.log_line import format_step

SCALARS = dict(
    iter=20,
    loss=1.23456,
    grad_norm=0.8123,
    lr=9.98e-5,
    samples=31.5,
    tokens_per_second=12345.6,
    learned_tokens_per_second=2310.2,
    time=1.5,
    data_time=0.015,
    vision_time=0.33,
    llm_time=1.05,
    optimizer_time=0.105,
    data_time_share=0.01,
    tflops=305.12,
    mfu=0.3085,
    memory_mib=42291.2,
)


def test_the_line():
    assert format_step(SCALARS, last=625, eta=920.4) == (
        'step  20/625  loss 1.2346  grad_norm 0.812  lr 9.98e-05  31.5 samples  12,346 tokens/s (2,310 learned)  '
        '1.5 s: data 1% vision 22% llm 70% optimizer 7%  305.1 TFLOP/s  MFU 30.9%  41.3 GiB  eta 0:15:20'
    )


def test_what_is_not_known_is_left_out():
    line = format_step({**SCALARS, 'vision_time': 0.0}, last=625)
    assert 'vision' not in line
    assert 'eta' not in line
    assert 'MFU' not in format_step({k: v for k, v in SCALARS.items() if k != 'mfu'}, last=625)
    assert format_step(dict(iter=1, loss=2.0), last=9) == 'step 1/9  loss 2.0000'


def test_learning_rates_of_parts_and_a_hooks_own_scalars():
    line = format_step(dict(iter=1, projector_lr=1e-3, llm_lr=1e-4), last=9)
    assert line == 'step 1/9  projector_lr 1.00e-03  llm_lr 1.00e-04'


def test_a_run_logs_lines_and_its_files_hold_every_scalar(run, capsys):
    backend = dict(type='mmengine.visualization.LocalVisBackend')
    visualizer = dict(type='mmengine.visualization.Visualizer', vis_backends=[backend])
    work_dir = run('done', max_epochs=1, visualizer=visualizer, **{'log_processor.window_size': 2})
    terminal = capsys.readouterr()
    assert [text.count('step 5/5 ') for text in terminal] == [0, 1]  # stdout is for results
    (log,) = work_dir.glob('*/*.log')
    (last,) = re.findall(r'^\d\d/\d\d [\d:]{8} - vlmtune - INFO - (step 5/5 .*)', log.read_text(), re.MULTILINE)
    assert 'mmengine - ' not in log.read_text()
    assert re.search(r'tokens/s \(.* learned\)  .* s: data \d+% vision \d+% llm \d+% optimizer \d+%', last)
    (metrics,) = work_dir.glob('*/metrics.jsonl')
    fourth, fifth = [json.loads(line) for line in metrics.read_text().splitlines()][-2:]
    (scalars,) = work_dir.glob('*/vis_data/scalars.json')  # what mmengine gives to trackers
    averaged = json.loads(scalars.read_text().splitlines()[-1])
    assert averaged['loss'] == pytest.approx((fourth['loss'] + fifth['loss']) / 2)
    tokens = sum(row['tokens_per_second'] * row['time'] for row in (fourth, fifth))
    assert averaged['tokens_per_second'] == pytest.approx(tokens / (fourth['time'] + fifth['time']))
    assert {*fifth} - {'epoch'} <= {*averaged}
