"""What a run writes is what the report reads: a real one, resumed, with validation and sample answers."""

from vlmtune.apps.report import report
from vlmtune.apps.report.run_files import read_runs


def test_a_real_run_is_reported(validated, tiny_data):
    picture = str(next(tiny_data('llava', rows=17).image_folder.iterdir()))
    asked = dict(evaluation_inputs=['What is it?'], evaluation_images=[picture], evaluation_freq=2)
    validated('a', max_steps=3, max_epochs=None, save_steps=2, **asked)
    work_dir = validated('a', resume=True, max_steps=4, max_epochs=None, save_steps=2, **asked)
    (run,) = read_runs([str(work_dir)])
    assert run.notes == []
    assert run.starts == 2
    assert [step for step, _ in run.series('loss')] == [1, 2, 3, 4]
    assert {'lr', 'grad_norm', 'tokens_per_second', 'memory_mib'} <= set(run.steps[-1])
    assert [at for at, _ in run.validation_series('loss')][:1] == [2]
    assert run.validation_series('cer')[-1][0] == 4
    assert [row['iteration'] for row in run.chats] == [0, 2, 3, 4]
    parts = {row['part']: row for row in run.parts}
    assert parts['llm'] == dict(parts['llm'], mode='lora', lr=0.01)
    assert parts['vision_encoder'] == dict(parts['vision_encoder'], mode='frozen', trainable=0, lr=None)
    assert len(list(work_dir.glob('*/parts.json'))) == 2
    (result,) = run.results
    assert len(result.rows) == 6
    assert result.rows[0]['scores'].keys() == {'exact_match', 'cer'}

    report([str(work_dir)])
    page = (work_dir / 'report.html').read_text()
    assert page.count('<img src="data:image/jpeg') == 1 + sum(len(row['images']) for row in result.rows)
    assert 'class="trouble"' not in page
    for name in ('Overview', 'Training', 'Validation', 'Sample answers', 'Answers', 'Parts', 'Config'):
        assert f'<h2>{name}</h2>' in page
