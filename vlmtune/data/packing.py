"""Which samples share a row.

Best-fit decreasing inside shuffled windows: packs are dense, differ from epoch to epoch, and long samples do not come
first. The plan depends on the sizes of the samples, the seed and the epoch alone, never on the number of ranks.
"""

import bisect
import hashlib
from collections.abc import Callable

import numpy as np

from vlmtune.utils.errors import DataError

WINDOW = 8192  # samples that are packed among themselves
_STEPS = 64  # a pack's size in steps; samples that are alike to one step keep their shuffled order

Plan = list[list[int]]


class _OpenPacks:
    """The packs of one window, sorted by the tokens that are left.

    Those that cannot take even the window's smallest image stand apart, so that a search for room does not pass them
    one by one.
    """

    def __init__(self, smallest_image: int) -> None:
        self._smallest_image = smallest_image  # patches
        self._with_room: list[tuple[int, int, int]] = []  # (tokens left, pack, patches left)
        self._text_only: list[tuple[int, int, int]] = []

    def take(self, tokens: int, patches: int) -> tuple[int, int, int] | None:
        """Remove and return the fullest pack that has room; None if there is none."""
        best = self._find(self._with_room, tokens, patches)
        if not patches:
            other = self._find(self._text_only, tokens, 0)
            if other is not None and (best is None or self._text_only[other] < self._with_room[best]):
                return self._text_only.pop(other)
        return None if best is None else self._with_room.pop(best)

    def put(self, tokens_left: int, pack: int, patches_left: int) -> None:
        """A pack, with what it still takes; a full one is closed."""
        if tokens_left:
            packs = self._with_room if patches_left >= self._smallest_image else self._text_only
            bisect.insort(packs, (tokens_left, pack, patches_left))

    @staticmethod
    def _find(packs: list[tuple[int, int, int]], tokens: int, patches: int) -> int | None:
        for at in range(bisect.bisect_left(packs, (tokens, -1, 0)), len(packs)):
            if packs[at][2] >= patches:
                return at
        return None


def _best_fit_decreasing(
    samples: np.ndarray, *, tokens: np.ndarray, patches: np.ndarray, max_length: int, max_patches: int
) -> Plan:
    """Every sample goes into the open pack that it fills best; those that take most of either budget come first.

    Args:
        samples: int[W] of one window; samples of like size keep this order, so that a new order makes new packs.
        tokens, patches: int[W], of those samples.
        max_length, max_patches: what a pack takes.
    """
    size = np.maximum(tokens * _STEPS // max_length, patches * _STEPS // max_patches)
    order = np.argsort(-size, kind='stable')
    images = patches[patches > 0]
    packs: Plan = []
    open_packs = _OpenPacks(int(images.min()) if len(images) else 0)
    for sample, length, vision in zip(
        samples[order].tolist(), tokens[order].tolist(), patches[order].tolist(), strict=True
    ):
        found = open_packs.take(length, vision)
        tokens_left, pack, patches_left = found or (max_length, len(packs), max_patches)
        if found is None:
            packs.append([])
        packs[pack].append(sample)
        open_packs.put(tokens_left - length, pack, patches_left - vision)
    return packs


def plan_packs(
    lengths: np.ndarray,
    *,
    max_length: int,
    seed: int,
    epoch: int,
    indices: np.ndarray | None = None,
    patches: np.ndarray | None = None,
    max_patches: int | None = None,
    window: int = WINDOW,
) -> Plan:
    """Packs of at most ``max_length`` tokens, and at most ``max_patches`` vision patches, for one epoch.

    Args:
        lengths: int[N], tokens of every sample.
        max_length: tokens per pack.
        seed, epoch: the plan is a function of these and the sizes.
        indices: int[M], the samples of this epoch, repeats allowed; None takes every sample once.
        patches: int[N], vision patches of every sample.
        max_patches: vision patches per pack; None sets no limit.
        window: samples that are packed among themselves.

    Raises:
        ValueError: a sample is larger than a pack.
    """
    chosen = np.arange(len(lengths)) if indices is None else indices
    if patches is None or max_patches is None:
        patches, max_patches = np.zeros(len(lengths), dtype=np.int64), 1
    for sizes, limit, unit in ((lengths, max_length, 'tokens'), (patches, max_patches, 'vision patches')):
        if len(chosen) and int(sizes[chosen].max()) > limit:
            worst = int(chosen[sizes[chosen].argmax()])
            raise ValueError(f'sample {worst} has {int(sizes[worst])} {unit}, a pack holds {limit}')
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(chosen)
    plan: Plan = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        packs = _best_fit_decreasing(
            part, tokens=lengths[part], patches=patches[part], max_length=max_length, max_patches=max_patches
        )
        plan += [packs[i] for i in rng.permutation(len(packs))]
    return plan


def check_patches(patches: np.ndarray, *, max_patches: int | None, name: Callable[[int], str]) -> None:
    """Refuse samples that no pack takes.

    Args:
        patches: int[N], of every sample.
        max_patches: what a pack takes; None sets no limit.
        name: of a sample, for the message.

    Raises:
        DataError: names the worst one.
    """
    if max_patches is not None and len(patches) and patches.max() > max_patches:
        worst = int(patches.argmax())
        raise DataError(
            f'{name(worst)}: has {patches[worst]} vision patches, a pack takes '
            f'max_patches={max_patches}; raise it, or let the processor make the images smaller (image_processor=...)',
            kind='oversized_image',
        )


def plan_batches(
    lengths: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    indices: np.ndarray | None = None,
    shuffle: bool = True,
    group_by_length: bool = False,
) -> Plan:
    """Batches of ``batch_size`` samples for one epoch, for training without packing.

    With ``group_by_length``, samples of like length come together inside shuffled windows, which saves padding.
    ``indices`` as in ``plan_packs``.
    """
    rng = np.random.default_rng((seed, epoch))
    order = np.arange(len(lengths)) if indices is None else indices
    order = rng.permutation(order) if shuffle else order
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
