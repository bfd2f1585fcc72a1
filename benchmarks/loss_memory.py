"""What the head and the loss cost: peak memory and time of one forward and backward pass.

python benchmarks/loss_memory.py [--tokens 1024] [--vocabulary 151936] [--runs 5]

A tiny Qwen2.5-VL (2 layers, width 64), float32, two threads. Every method runs in a process of its own. Memory is what
the resident set grew by at its peak over the first pass, all gradients included; time is the fastest pass after it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine

from vlmtune.models import SupervisedFinetune
from vlmtune.structures import IGNORE_INDEX
from vlmtune.testing import write_tiny_model

SHARES = (10, 50, 90)  # percent of the tokens that are learned
HEADS = ('full', 'frozen')


def of_labels(model: SupervisedFinetune, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own loss over whole logits."""
    return model.model(**batch, use_cache=False).loss


def of_logits_to_keep(model: SupervisedFinetune, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own loss over the logits of learned positions."""
    shifted = F.pad(batch['labels'], (0, 1), value=IGNORE_INDEX)[:, 1:]
    keep = shifted != IGNORE_INDEX
    return model.model(**batch, shift_labels=shifted[keep], logits_to_keep=keep, use_cache=False).loss


def of_vlmtune(model: SupervisedFinetune, batch: dict[str, Any]) -> torch.Tensor:
    """Learned positions only, chunk by chunk."""
    return model(**batch) / (batch['labels'][:, 1:] != IGNORE_INDEX).sum()


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    'labels=': of_labels,
    'logits_to_keep=': of_logits_to_keep,
    'vlmtune': of_vlmtune,
}


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(path: str, *, method: str, share: int, head: str, tokens: int, runs: int) -> dict[str, float]:
    """One method, in this process."""
    torch.set_num_threads(2)
    model = SupervisedFinetune(path, tune=dict(llm='full', embeddings=head, lm_head=head), dtype='float32').train()
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(100, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : tokens - tokens * share // 100] = IGNORE_INDEX
    batch = dict(input_ids=ids, labels=labels, position_ids=torch.arange(tokens).expand(4, 1, -1))
    seconds = []
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from now
    before = resident_mib('VmRSS')
    for run in range(runs + 1):
        started = time.perf_counter()
        loss = METHODS[method](model, batch)
        loss.backward()
        seconds.append(time.perf_counter() - started)
        if run == 0:
            peak = resident_mib('VmHWM') - before
        model.zero_grad()
    return dict(mib=peak, seconds=min(seconds[1:]), loss=loss.item())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, default=1024)
    parser.add_argument('--vocabulary', type=int, default=151_936)
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--one', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one), tokens=args.tokens, runs=args.runs)))
        return
    print(f'machine: {describe_machine()}, torch {torch.__version__}')
    print(f'{args.tokens} tokens, vocabulary {args.vocabulary}, {args.runs} runs each\n')
    print('| head | learned | method | peak growth | of labels= | time | loss |\n|---|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_model('qwen2_5_vl', folder, text_config=dict(vocab_size=args.vocabulary))
        for head in HEADS:
            for share in SHARES:
                whole = None
                for method in METHODS:
                    what = json.dumps(dict(path=str(path), method=method, share=share, head=head))
                    sizes = ['--tokens', str(args.tokens), '--runs', str(args.runs)]
                    command = [sys.executable, __file__, '--one', what, *sizes]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    whole = whole or found['mib']
                    print(
                        f'| {head} | {share} % | {method} '
                        f'| {found["mib"]:.0f} MiB | {100 * found["mib"] / whole:.0f} % '
                        f'| {found["seconds"]:.2f} s | {found["loss"]:.6f} |',
                        flush=True,
                    )


if __name__ == '__main__':
    main()
