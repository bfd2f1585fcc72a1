"""``vlmtune test`` in several processes, and what an interrupted one leaves."""

import json
import subprocess
import sys
import time

import pytest

from tests.apps.asked import predictions, told_by, write_config
from vlmtune.apps.test import evaluate
from vlmtune.cli import build_parser, main
from vlmtune.evaluation.generation import answer_prompts
from vlmtune.verbs.test import command


def test_two_processes_answer_as_one(trained_run, work, warm_ranks):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora', projector='full', vision_encoder='frozen')
    options = dict(config=str(work / config), checkpoint=run.checkpoint)
    scores = evaluate(**options, out='one')
    ended = warm_ranks.run(2, app='vlmtune.apps.test.evaluate', **options, out=work / 'two')
    assert ended.codes == [0, 0], ended.said
    assert predictions(work / 'two') == predictions(work / 'one')
    result = json.loads((work / 'two' / 'metrics.json').read_text())
    assert (result['metrics'], result['processes'], result['samples']) == (scores, 2, 5)
    failed = warm_ranks.run(2, app='vlmtune.apps.test.evaluate', **{**options, 'checkpoint': str(work / 'gone.pth')})
    assert failed.codes == [1, 1]
    assert all('expected the directory iter_N.pth of a checkpoint' in said for said in failed.said)


def test_ctrl_c_of_one_process_is_told_to_the_others(trained_run, work, warm_ranks):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora', projector='full', vision_encoder='frozen')
    (work / 'pressing.py').write_text(
        'import os\nfrom vlmtune.data import llava_map_fn\n\n\ndef pressed(row):\n'
        "    if os.environ['RANK'] == '1':\n        raise KeyboardInterrupt\n    return llava_map_fn(row)\n"
    )
    text = (work / config).read_text().replace('llava_map_fn', 'pressed')
    (work / config).write_text('from pressing import pressed\n' + text.replace('pressed, load_rows', 'load_rows'))
    ended = warm_ranks.run(2, app='vlmtune.apps.test.evaluate', config=str(work / config), checkpoint=run.checkpoint)
    assert ended.codes == [1, 1]
    assert 'RankFailed: rank 1 failed: KeyboardInterrupt\n' in ended.said[0], ended.said


def test_every_option_reaches_the_processes():
    words = ['test', 'c.py', 'iter_5.pth', '--out', 'o', '--limit', '3', '--batch-size', '2', '--work-dir', 'w']
    arguments = build_parser().parse_args([*words, '--nproc', '2', '--cfg-options', 'a=1', 'b=2'])
    words = command(arguments)
    again = build_parser().parse_args([*words, '--launcher', 'pytorch'])
    assert {**vars(again), 'nproc': 2, 'launcher': 'none'} == vars(arguments)


def test_ctrl_c_keeps_what_is_answered(trained_run, work, monkeypatch, capsys, caplog):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    config = write_config(work, run, llm='lora', projector='full', vision_encoder='frozen')
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer_prompts(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr('vlmtune.evaluation.asking.answer_prompts', interrupted)
        assert main(['test', config, run.checkpoint, '--out', 'here']) == 130
    told = capsys.readouterr().err
    assert told.endswith('\ninterrupted; what is answered stays in here, and the same command goes on with it\n')
    assert 'Traceback' not in told
    with caplog.at_level('INFO', 'vlmtune'):
        evaluate(config, run.checkpoint, out='here')
    assert '2 of 5 questions were answered before' in caplog.text
    assert predictions(work / 'here') == told_by(run, work)


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(trained_run, work):
    run = trained_run('llava', llm='lora', projector='full', vision_encoder='frozen')
    write_config(work, run, llm='lora', projector='full', vision_encoder='frozen')
    (work / 'rows.jsonl').write_text((work / 'rows.jsonl').read_text() * 80)
    call = [sys.executable, '-m', 'vlmtune', 'test', 'mine.py', run.checkpoint, '--batch-size', '1', '--out']
    process = subprocess.Popen([*call, 'killed'], cwd=work)
    part = work / 'killed' / 'predictions.jsonl.part0'
    while not part.exists() or part.read_text().count('\n') < 20:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = part.read_text().count('\n') - 1
    assert 0 < done < 400
    ended = subprocess.run([*call, 'killed'], cwd=work, check=True, capture_output=True, text=True)
    assert f'{done} of 400 questions were answered before' in ended.stderr
    subprocess.run([*call, 'whole'], cwd=work, check=True)
    assert predictions(work / 'killed') == predictions(work / 'whole')
