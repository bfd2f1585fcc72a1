"""A line of JSON per step, in the folder of the run."""

import json


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_scalar_of_every_step(run):
    work_dir = run('done', max_epochs=1)
    (path,) = work_dir.glob('*/metrics.jsonl')
    rows = read(path)
    assert [row['step'] for row in rows] == [1, 2, 3, 4, 5]
    assert {'loss', 'lr', 'grad_norm', 'samples', 'tokens_per_second', 'learned_tokens_per_second'} <= rows[0].keys()
    assert {'time', 'data_time', 'vision_time', 'llm_time', 'optimizer_time', 'tflops', 'memory_mib'} <= rows[0].keys()
    assert 'mfu' not in rows[0]  # the peak of a CPU is not known
    assert sum(row['samples'] for row in rows) == 17


def test_a_resumed_run_writes_into_its_own_folder(run):
    work_dir = run('done', max_epochs=None, max_steps=2)
    (first,) = work_dir.glob('*/metrics.jsonl')
    before = first.read_text()
    run('done', max_epochs=None, max_steps=4, resume=True)
    lines = [row for path in sorted(work_dir.glob('*/metrics.jsonl')) for row in read(path)]
    assert [row['step'] for row in lines] == [1, 2, 3, 4]
    assert first.read_text().startswith(before)  # the same folder only if the second has not gone by


def test_the_interval(run):
    work_dir = run('done', max_epochs=1, **{'default_hooks.metrics.interval': 2})
    (path,) = work_dir.glob('*/metrics.jsonl')
    assert [row['step'] for row in read(path)] == [2, 4]
