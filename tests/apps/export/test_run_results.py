"""Numbers on a model card: read from the run, kept with the adapter, shown once it is merged."""

import json
import shutil
from pathlib import Path

from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.export.merge import merge
from vlmtune.apps.export.record import RECORD_FILE, read_record
from vlmtune.apps.export.run_results import read_results


def write_results(checkpoint: Path) -> None:
    work_dir = checkpoint.parent
    (work_dir / 'test' / 'iter_2').mkdir(parents=True)
    (work_dir / 'test' / 'iter_2' / 'metrics.json').write_text(
        json.dumps(dict(metrics=dict(exact_match=0.8125, cer=0.05), samples=16))
    )
    lines = [dict(iteration=i, epoch=0, loss=1 / i, cer=0.5 / i, seconds=3.0, samples=4) for i in (1, 2, 3)]
    (work_dir / 'validation.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\nbroken')


def test_metrics_of_the_checkpoint_reach_the_card_of_the_merged_model(trained_run, tmp_path):
    run = trained_run('llama', llm='lora')
    checkpoint = tmp_path / 'run' / 'iter_2.pth'
    shutil.copytree(run.checkpoint, checkpoint)
    write_results(checkpoint)
    pth_to_hf(run.config, str(checkpoint), str(tmp_path / 'adapter'))
    merge(run.base, str(tmp_path / 'adapter'), str(tmp_path / 'merged'), device='cpu')
    for name in ('adapter', 'merged'):
        card = (tmp_path / name / 'README.md').read_text()
        assert '| | test | validation |\n|---|---:|---:|\n' in card
        for line in ('| exact_match | 0.8125 |  |', '| cer | 0.05 | 0.25 |', '| loss |  | 0.5 |'):
            assert line in card
        assert 'seconds' not in card
    assert 'vllm serve path/to/this/folder' in card
    assert 'lmdeploy serve api_server' in card
    assert 'sglang.launch_server' in card


def test_a_run_without_metrics_has_no_table(trained_run, tmp_path):
    run = trained_run('llama', llm='lora')
    assert read_results(Path(run.checkpoint)) == {}
    (tmp_path / 'validation.jsonl').write_text('{"iteration": 2, "loss": null}\n[]\n')
    (tmp_path / 'test' / 'iter_2').mkdir(parents=True)
    (tmp_path / 'test' / 'iter_2' / 'metrics.json').write_text('{"metrics"')
    assert read_results(tmp_path / 'iter_2.pth') == {}
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    assert '## Metrics' not in (tmp_path / 'adapter' / 'README.md').read_text()


def test_a_test_of_the_first_questions_alone_says_nothing(tmp_path):
    write_results(tmp_path / 'iter_2.pth')
    file = tmp_path / 'test' / 'iter_2' / 'metrics.json'
    file.write_text(json.dumps(dict(metrics=dict(exact_match=0.8125), limit=None)))
    assert read_results(tmp_path / 'iter_2.pth')['test'] == {'exact_match': 0.8125}
    file.write_text(json.dumps(dict(metrics=dict(exact_match=0.8125), limit=10)))
    assert set(read_results(tmp_path / 'iter_2.pth')) == {'validation'}


def test_a_record_of_an_older_version_has_no_metrics(trained_run, tmp_path):
    run = trained_run('llama', llm='lora')
    pth_to_hf(run.config, run.checkpoint, str(tmp_path / 'adapter'))
    file = tmp_path / 'adapter' / RECORD_FILE
    content = json.loads(file.read_text())
    del content['metrics']
    file.write_text(json.dumps(content))
    record = read_record(tmp_path / 'adapter')
    assert record is not None
    assert record.metrics == {}
