"""A run that is killed anywhere and resumed ends with the weights of one that was not, bit for bit."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from vlmtune.testing.faults import SAVING, TRAINING


@dataclass(frozen=True)
class Kill:
    """One kill: how many ranks, which of them, at which of its points, before it or halfway through."""

    world_size: int
    rank: int
    at: int
    kind: str
    fault: str

    def __str__(self) -> str:
        return f'{self.fault} of rank {self.rank} of {self.world_size} at point {self.at} ({self.kind})'


def draw(number: int, *, whole, points, seed: int) -> list[Kill]:
    """Kills at drawn points: two thirds inside a save, a quarter of all with two ranks."""
    rng = random.Random(seed)
    kills = []
    for i in range(number):
        world_size = 2 if i % 4 == 3 else 1
        rank = rng.randrange(world_size)
        reached = points(whole(world_size), rank)
        kinds = SAVING if rng.random() < 2 / 3 else TRAINING
        kind = rng.choice([kind for kind in kinds if kind in reached])  # rank 1 renames nothing
        at = rng.choice([at for at, found in enumerate(reached) if found == kind])
        fault = rng.choice(['kill', 'kill_halfway']) if reached[at] == 'write' else 'kill'
        kills.append(Kill(world_size, rank, at, reached[at], fault))
    return kills


def histogram(kills: list[Kill]) -> str:
    """How many kills of which kind."""
    counts = Counter((kill.world_size, f'{kill.kind}{" halfway" * (kill.fault == "kill_halfway")}') for kill in kills)
    inside = sum(kill.kind in SAVING for kill in kills)
    lines = [f'{len(kills)} kills, {inside} of them inside a save']
    lines += [f'{size} rank{"s" * (size > 1)}  {kind:<16} {count:>4}' for (size, kind), count in sorted(counts.items())]
    return '\n'.join(lines)


@pytest.fixture(scope='session')
def survive(go, check_end):
    """``survive(kill, folder, ranks)``: be killed, resume, end as if nothing had happened."""

    def one(kill, folder, ranks):
        work_dir = folder / 'run'
        faults = dict(journal=str(folder), on_rank=kill.rank, at=kill.at, fault=kill.fault)
        killed = go(kill.world_size, work_dir, faults=faults, ranks=ranks)
        assert killed.codes[kill.rank] == -9, killed
        resumed = go(kill.world_size, work_dir, resume=True, ranks=ranks)
        assert resumed.codes == [0] * kill.world_size, (killed.said, resumed.said)
        check_end(work_dir, kill.world_size)

    return one


def test_some_kills(warm_ranks, survive, whole, points, tmp_path):
    """The quick part; ``make chaos`` draws many more."""
    kills = draw(6, whole=whole, points=points, seed=3)
    assert sum(kill.kind in SAVING for kill in kills) >= len(kills) / 2
    assert {kill.world_size for kill in kills} == {1, 2}
    for number, kill in enumerate(kills):
        survive(kill, tmp_path / str(number), warm_ranks)


@pytest.mark.chaos
def test_two_hundred_kills(spread, survive, whole, points, capsys):
    kills = draw(200, whole=whole, points=points, seed=200)
    failures = spread(survive, kills)
    with capsys.disabled():
        print(f'\n{histogram(kills)}\n{len(kills) - len(failures)} of {len(kills)} ended with the undisturbed bits')
    assert sum(kill.kind in SAVING for kill in kills) >= len(kills) / 2
    assert failures == []
