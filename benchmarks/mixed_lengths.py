"""Rows of mixed length: vlmtune, a packed loop written by hand, and TRL's SFTTrainer, on the same files, in turn.

Every contender learns the answers of the same rows once, in float32, with fused AdamW at a constant learning rate. TRL
runs with batches of 4, 8 and 16, in random order and grouped by length; the fastest goes on to the later rounds. "Step"
is the time from the moment a step has its inputs to its end; "all" also holds reading, decoding, processing and, for
vlmtune, planning and the check of isolation. Loading the model and imports are in neither.

python benchmarks/mixed_lengths.py [--kinds findings short long images] [--rounds 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import describe_machine

CONTENDERS = Path(__file__).parent / 'contenders'
sys.path.insert(0, str(CONTENDERS))
from workload import KINDS, write_workload  # noqa: E402  (a script's neighbour, not a package)

MAX_LENGTH = 2048
BATCHES = (4, 8, 16)


@dataclass
class Contender:
    """One way to train, and what its runs answered."""

    name: str
    script: str
    arguments: tuple[str, ...]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self, workload: Path) -> None:
        """Train once, in a process of its own."""
        command = [sys.executable, str(CONTENDERS / self.script), str(workload), *self.arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f'{" ".join(command)}\n{done.stderr[-3000:]}')
        self.runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f'{self.name}: {self.runs[-1]}', file=sys.stderr)

    def median(self, key: str) -> float:
        """The median over the runs."""
        return statistics.median(run[key] for run in self.runs)

    def row(self, reference: 'Contender') -> str:
        """A line of the table; the last column compares with ``reference``."""
        totals = [run['total'] for run in self.runs]
        return (
            f'| {self.name} | {self.runs[0]["steps"]} | {self.samples_a_step:.1f} | {self.median("step"):.1f} | '
            f'{self.median("total"):.1f} | {min(totals):.1f} to {max(totals):.1f} | {self.median("peak_mib"):.0f} | '
            f'{reference.median("total") / self.median("total"):.2f} |'
        )

    @property
    def samples_a_step(self) -> float:
        """Mean."""
        return self.runs[0]['samples'] / self.runs[0]['steps']


def compare(kind: str, rounds: int) -> list[str]:
    """The table of one kind of rows."""
    peers = [
        Contender(f'TRL, batch {batch}, {order.replace("_", " ")}', 'trl_run.py', (str(batch), order))
        for batch in BATCHES
        for order in ('random', 'group_by_length')
    ]
    loop = Contender(f'loop by hand, packs of {MAX_LENGTH}', 'loop_run.py', (str(MAX_LENGTH),))
    ours = [
        Contender(f'vlmtune, packs of {MAX_LENGTH}, {n} workers', 'vlmtune_run.py', (str(MAX_LENGTH), str(n)))
        for n in (0, 1)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        workload = Path(scratch)
        write_workload(workload, kind)
        for peer in peers:
            peer.run(workload)
        best = min(peers, key=lambda peer: peer.median('total'))
        for contender in (loop, *ours):
            contender.run(workload)
        facts = ours[0].runs[0]
        like = _like(best, facts)
        like.run(workload)
        for _ in range(rounds - 1):
            for contender in (best, loop, *ours, like):
                contender.run(workload)
    image_share = facts['image_tokens'] / facts['tokens']
    return [
        f'## {kind}\n',
        f'{facts["samples"]} rows, {facts["tokens"]:,} tokens ({image_share:.0%} image tokens), of which '
        f'{facts["supervised"]:,} are supervised; the longest row has {facts["longest"]}.\n',
        '| contender | optimizer steps | samples a step | steps alone, s | all, s (median) | from, to | '
        'peak MiB above imports | times as fast as the best TRL |',
        '|---|---|---|---|---|---|---|---|',
        *(contender.row(best) for contender in (*ours, like, loop, *peers)),
        _summary(ours, like=like, loop=loop, best=best, peers=peers),
    ]


def _summary(
    ours: list[Contender], *, like: Contender, loop: Contender, best: Contender, peers: list[Contender]
) -> str:
    step = loop.median('step') / ours[0].median('step')
    total = loop.median('total') / min(contender.median('total') for contender in ours)
    memory = like.median('peak_mib') / best.median('peak_mib')
    luckiest = min(run['total'] for peer in peers for run in peer.runs)
    return (
        f'\nAgainst the loop: steps {step:.2f} times as fast, all (the better of 0 and 1 workers) {total:.2f}. At '
        f"{like.samples_a_step:.1f} samples a step, peak memory is {memory:.2f} of the best TRL run's. "
        f'The fastest of all TRL runs took {luckiest:.1f} s, {luckiest / ours[0].median("total"):.2f} times as long as '
        'vlmtune with 0 workers.\n'
    )


def _like(best: Contender, facts: dict[str, Any]) -> Contender:
    """vlmtune with about as many samples in a step as the best TRL run."""
    length = max(facts['longest'], round(facts['tokens'] / facts['samples'] * best.samples_a_step))
    return Contender(f'vlmtune, packs of {length}, 0 workers', 'vlmtune_run.py', (str(length), '0'))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kinds', nargs='+', choices=list(KINDS), default=list(KINDS))
    parser.add_argument('--rounds', type=int, default=3)
    arguments = parser.parse_args()
    versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'transformers', 'trl'))
    print(f'# Mixed lengths\n\nmachine: {describe_machine()}; {versions}; {arguments.rounds} rounds\n')
    for kind in arguments.kinds:
        print('\n'.join(compare(kind, arguments.rounds)), flush=True)


if __name__ == '__main__':
    main()
