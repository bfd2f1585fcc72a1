"""Tokens per second count all tokens, once; the progress bar keeps out of files."""

import json

import torch

from vlmtune.engine.hooks.throughput import peak_memory_mib


def test_it_is_logged_every_step(run):
    work_dir = run('done', max_steps=3, max_epochs=None)
    messages = json.loads((work_dir / 'iter_3.pth' / 'trainer.json').read_text())['messages']
    assert len(messages['train/tokens_per_second']['values']) == 3
    assert min(messages['train/tokens_per_second']['values']) > 0
    assert messages['train/memory_mib']['values'][0] > 100


def test_memory_of_a_process():
    before = peak_memory_mib(torch.device('cpu'))
    block = torch.ones(64 << 18)  # 64 MiB
    assert peak_memory_mib(torch.device('cpu')) >= before
    assert len(block)


def test_no_bar_where_there_is_no_terminal(run, capsys):
    run('done', max_steps=1, max_epochs=None)
    assert 'step/s' not in capsys.readouterr().err
