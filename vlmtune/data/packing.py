"""Which samples share a row.

Best-fit decreasing inside shuffled windows: packs are dense, differ from epoch to epoch, and long samples do not come
first. The plan depends on the lengths, the seed and the epoch alone, never on the number of ranks.
"""

import bisect
import hashlib
from collections.abc import Sequence

import numpy as np

WINDOW = 8192  # samples that are packed among themselves

Plan = list[list[int]]


def _best_fit_decreasing(indices: Sequence[int], lengths: np.ndarray, max_length: int) -> Plan:
    """Every sample goes into the open pack that it fills best; longest first.

    Lengths that are nearly alike keep the order of ``indices``, so that a new order makes new packs.
    """
    alike = max(1, max_length // 64)  # tokens; packs stay as dense
    packs: Plan = []
    free: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for index in sorted(indices, key=lambda i: -(lengths[i] // alike)):
        length = int(lengths[index])
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            packs.append([index])
            left, pack = max_length - length, len(packs) - 1
        else:
            left, pack = free.pop(at)
            packs[pack].append(index)
            left -= length
        if left > 0:
            bisect.insort(free, (left, pack))
    return packs


def plan_packs(lengths: np.ndarray, *, max_length: int, seed: int, epoch: int, window: int = WINDOW) -> Plan:
    """Packs of at most ``max_length`` tokens for one epoch.

    Args:
        lengths: int[N], tokens of every sample.
        max_length: tokens per pack.
        seed, epoch: the plan is a function of these and the lengths.
        window: samples that are packed among themselves.

    Raises:
        ValueError: a sample is longer than a pack.
    """
    if len(lengths) and int(lengths.max()) > max_length:
        raise ValueError(f'sample {int(lengths.argmax())} has {int(lengths.max())} tokens, a pack holds {max_length}')
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)).tolist()
    plan: Plan = []
    for start in range(0, len(order), window):
        packs = _best_fit_decreasing(order[start : start + window], lengths, max_length)
        plan += [packs[i] for i in rng.permutation(len(packs))]
    return plan


def plan_batches(
    lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int, shuffle: bool = True, group_by_length: bool = False
) -> Plan:
    """Batches of ``batch_size`` samples for one epoch, for training without packing.

    With ``group_by_length``, samples of like length come together inside shuffled windows, which saves padding.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if group_by_length:
        window = batch_size * 64
        windows = [order[i : i + window] for i in range(0, len(order), window)]
        order = np.concatenate([w[np.argsort(-lengths[w], kind='stable')] for w in windows]) if windows else order
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if group_by_length and shuffle else batches


def plan_hash(plan: Plan) -> str:
    """A short hash by which a resumed run knows that its plan is the same."""
    flat = np.array([x for pack in plan for x in (*pack, -1)], dtype=np.int64)
    return hashlib.sha256(flat.tobytes()).hexdigest()[:16]
