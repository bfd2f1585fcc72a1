"""The commands of docs/getting_started.md, one after the other as they stand there; the runs are shortened."""

import shlex

from tests.docs.pages import ROOT, blocks
from vlmtune.cli import main

SHORT = ['--cfg-options', 'max_epochs=0.03', 'evaluation_inputs=[]', 'evaluation_images=[]', 'plan_cache_dir=None']
LIMIT = {'test': ['--limit', '6'], 'train': SHORT, 'check-data': ['--cfg-options', 'plan_cache_dir=None']}


def commands():
    (first, second) = blocks('sh run')
    return [shlex.split(line) for block in (first, second) for line in block.text.splitlines()]


def test_the_page_runs_from_top_to_bottom(quickstart_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    steps = commands()
    assert [words[1] for words in steps[1:]] == [
        'check-data', 'train', 'train', 'train', 'test', 'report', 'convert', 'convert', 'chat',
    ]  # fmt: skip
    assert steps[0] == ['python', 'quickstart/prepare_data.py']  # which quickstart_data has run
    for _, *words in steps[1:]:
        words = [word.replace('work_dirs/first', str(tmp_path)).replace('iter_300', 'iter_3') for word in words]
        capsys.readouterr()
        assert main([*words, *LIMIT.get(words[0], [])]) == 0, (words, capsys.readouterr().err)
    assert 'shape' in capsys.readouterr().out or (tmp_path / 'merged' / 'model.safetensors').is_file()
    assert '<svg' in (tmp_path / 'report.html').read_text('utf-8')
    assert list(tmp_path.glob('test/*/metrics.json'))
