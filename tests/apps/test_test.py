"""``vlmtune test``: the models that it takes, the files that it writes, and how it is called."""

import json
import re
import subprocess

import pytest

from tests.apps.asked import predictions, told_by, write_config
from vlmtune.apps.export.convert import pth_to_hf
from vlmtune.apps.export.merge import merge
from vlmtune.apps.report import report
from vlmtune.apps.test import evaluate
from vlmtune.cli import main
from vlmtune.utils.errors import CheckpointError, ConfigError, DataError


def test_a_checkpoint_is_asked_as_it_was_trained(trained_run, work, capsys):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora', projector='full', vision_encoder='frozen')
    assert main(['test', config, run.checkpoint]) == 0
    folder = work / 'work_dirs' / 'mine' / 'test' / run.checkpoint.rpartition('/')[2].removesuffix('.pth')
    want = told_by(run, work)
    assert predictions(folder) == want
    assert len(set(want)) > 1
    result = json.loads((folder / 'metrics.json').read_text())
    assert result['metrics'] == {'exact_match': 0.0}
    assert (result['samples'], result['cut_off'], result['skipped']) == (5, 5, [])
    assert (result['batch_size'], result['processes'], result['checkpoint']) == (2, 1, run.checkpoint)
    assert (result['limit'], result['data']) == (None, ['rows.jsonl'])
    assert [(one['size'], one['samples']) for one in result['speed']] == [('to 256 x 256', 5)]
    printed = capsys.readouterr().out
    assert 'exact_match: 0.0000' in printed
    assert 's/sample' in printed
    rows = [json.loads(line) for line in (folder / 'predictions.jsonl').read_text().splitlines()]
    assert [row['scores'] for row in rows] == [{'exact_match': 0.0}] * 5


def test_what_a_checkpoint_was_trained_with_is_what_it_says_itself(trained_run, work, rewrite, caplog):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora')
    changed = {'model.lora.alpha': 160, 'model.dtype': 'bfloat16', 'pretrained_model_name_or_path': str(work / 'gone')}
    evaluate(config, run.checkpoint, out='here', overrides=changed)
    assert predictions(work / 'here') == told_by(run, work)
    assert f'tune and lora and dtype of the model as {run.checkpoint} says, not as the config says' in caplog.text
    other = rewrite(run, work, lambda text: text.replace('alpha=16', 'alpha=160'))
    evaluate(config, str(other), out='here')
    assert predictions(work / 'here' / 'earlier_1') == told_by(run, work) != predictions(work / 'here')


def test_the_config_says_where_the_base_of_a_checkpoint_went(trained_run, work, rewrite):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora')
    moved = rewrite(run, work, lambda text: text.replace(run.base, str(work / 'gone')))
    evaluate(config, str(moved), out='here')
    assert predictions(work / 'here') == told_by(run, work)


def test_a_checkpoint_on_a_quantised_base_gets_that_base(trained_run, work):
    run = trained_run('llava', llm='lora', quantization='nf4')
    write_config(work, run, llm='lora', quantization='nf4')
    evaluate('mine.py', run.checkpoint, out='here')
    assert predictions(work / 'here') == told_by(run, work)


def test_an_adapter_a_merged_model_and_the_base_are_asked(trained_run, work):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora', projector='full', vision_encoder='frozen')
    pth_to_hf(run.config, run.checkpoint, 'adapter')
    merge(run.base, 'adapter', 'merged')
    for name in ('adapter', 'merged'):
        evaluate(config, name, work_dir='run')
        assert predictions(work / 'run' / 'test' / name) == told_by(run, work)
    evaluate(config, run.base, out='one')
    evaluate(config, out='two')
    assert predictions(work / 'one') == predictions(work / 'two') != told_by(run, work)


@pytest.mark.parametrize('which', ['base', 'checkpoint'])
def test_the_resolution_of_the_config_holds(trained_run, work, which):
    run = trained_run('qwen2_5_vl', llm='lora')
    config = write_config(work, run, llm='lora')
    tokens = []
    for pixels in (None, dict(max_pixels=56 * 56, min_pixels=28 * 28)):
        evaluate(config, getattr(run, which), out=f'out{len(tokens)}', overrides=dict(image_processor=pixels))
        (one,) = json.loads((work / f'out{len(tokens)}' / 'metrics.json').read_text())['speed']
        tokens.append(one['image_tokens'])
    assert tokens[1] < tokens[0]


def test_validation_data_serves_where_there_is_no_other(trained_run, work):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, which='val', llm='lora')
    assert evaluate(config, limit=2, out='here') == {'exact_match': 0.0}
    assert len(predictions(work / 'here')) == 2
    evaluate(config, out='here', overrides=dict(test_cfg=dict(limit=3)))
    assert len(predictions(work / 'here')) == 3
    assert len(predictions(work / 'here' / 'earlier_1')) == 2
    results = [json.loads((folder / 'metrics.json').read_text()) for folder in (work / 'here', work / 'here/earlier_1')]
    assert [(result['limit'], result['data']) for result in results] == [(3, ['rows.jsonl']), (2, ['rows.jsonl'])]
    text = (work / config).read_text()
    (work / config).write_text(text[: text.index('rows =')])
    with pytest.raises(ConfigError, match='mine.py has neither test_dataloader nor val_dataloader; add'):
        evaluate(config)


def test_without_an_evaluator_there_are_answers_and_no_scores(trained_run, work):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora')
    text = (work / config).read_text()
    (work / config).write_text(text[: text.index('test_evaluator =')])
    assert evaluate(config, limit=1, out='here') == {}
    assert json.loads((work / 'here' / 'metrics.json').read_text())['metrics'] == {}


@pytest.mark.parametrize(
    ('checkpoint', 'said'),
    [
        ('gone.pth', 'gone.pth does not exist; expected the directory iter_N.pth of a checkpoint'),
        ('damaged', 'model.safetensors was changed or damaged|has .* bytes, expected'),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(trained_run, work, checkpoint, said):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora')
    if checkpoint == 'damaged':
        subprocess.run(['cp', '-r', run.checkpoint, 'damaged.pth'], check=True)
        with (work / 'damaged.pth' / 'model.safetensors').open('r+b') as file:
            file.seek(-1, 2)
            file.write(b'\x7f')
        checkpoint = 'damaged.pth'
    with pytest.raises(CheckpointError, match=said) as caught:
        evaluate(config, checkpoint)
    assert '\n' not in str(caught.value)
    assert not (work / 'work_dirs').exists()


def test_mistakes_in_metrics_and_data_are_told_before_the_weights_are_read(trained_run, work, monkeypatch):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora')
    text = (work / config).read_text()
    monkeypatch.setattr('vlmtune.apps.test.load_tested', lambda *_, **__: pytest.fail('weights were read'))
    (work / config).write_text(text.replace("'exact_match'", "'exakt_match'"))
    with pytest.raises(ConfigError, match='exact_match'):
        evaluate(config)
    (work / config).write_text(text)
    with pytest.raises(ConfigError, match='rows.jsonl is a file; answers need a folder, choose another --out'):
        evaluate(config, out='rows.jsonl')
    rows = (work / 'rows.jsonl').read_text()
    turns = [json.loads(line) for line in rows.splitlines()]
    asked = [json.dumps({**row, 'conversations': row['conversations'][:-1]}) + '\n' for row in turns]
    (work / 'rows.jsonl').write_text(''.join(asked))
    with pytest.raises(ConfigError, match='metrics: none of 5 rows has an answer in its last turn to compare with'):
        evaluate(config)
    (work / 'rows.jsonl').write_text(rows)
    (work / '3.png').write_text('no image')
    with pytest.raises(DataError, match=r'sample 3 \(rows.jsonl:4\): not an image file: .*3.png'):
        evaluate(config, run.checkpoint)


def test_rows_without_references_are_asked_counted_and_told(trained_run, work, caplog):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora', projector='full', vision_encoder='frozen')
    first, *rows = (work / 'rows.jsonl').read_text().splitlines()
    asked = json.loads(first)
    asked['conversations'].pop()
    (work / 'rows.jsonl').write_text('\n'.join([json.dumps(asked), *rows]))
    evaluate(config, run.checkpoint)
    assert '1 of 5 rows have no reference' in caplog.text
    (file,) = work.glob('work_dirs/mine/test/*/metrics.json')
    assert json.loads(file.read_text())['without_reference'] == 1
    report(['work_dirs/mine'], out='page.html')
    assert re.search(r'>without_reference<.{0,20}>1<', (work / 'page.html').read_text())
