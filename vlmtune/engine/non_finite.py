"""Steps whose loss or gradients are not finite: they are written down, and skipped or the end of the run."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from mmengine.logging import MessageHub
from torch import Tensor

from vlmtune.data.sample_places import Place, in_words, places
from vlmtune.engine import ranks
from vlmtune.utils.errors import ConfigError, TrainingError
from vlmtune.utils.json_lines import append_lines

logger = logging.getLogger(__name__)

NON_FINITE_FILE = 'non_finite.jsonl'
SKIPPED = 'train/skipped_steps'
"""The scalar that counts them. Checkpoints keep scalars, so a resumed run goes on counting."""

Kind: TypeAlias = Literal['loss', 'norm of the gradients']


class NonFinite(NamedTuple):
    """What one rank found in one step; a line of the file.

    Attributes:
        rank: of the process.
        kind: the loss is known by micro-batch; the norm is of the whole step, over all ranks.
        micro_batch: its number in the step; None for all of them.
        value: 'nan', 'inf' or '-inf'; JSON has no such numbers.
        samples: of those micro-batches.
    """

    rank: int
    kind: Kind
    micro_batch: int | None
    value: str
    samples: list[Place]


class NonFiniteGuard:
    """Skips up to ``max_skipped`` steps of a run, and ends it at the next.

    Of a skipped step no weight and no moment is changed. It counts as a step: schedule and data go on. A loss that is
    not finite is not logged, so that averages and saved histories stay finite.

    Args:
        file: gets a line for everything that was found.
        hub: keeps the count.
        max_skipped: steps; 0 ends the run at the first.

    Raises:
        ConfigError: ``max_skipped`` is not a number of steps.
    """

    def __init__(self, file: Path, *, hub: MessageHub, max_skipped: int = 0) -> None:
        if not isinstance(max_skipped, int) or isinstance(max_skipped, bool) or max_skipped < 0:
            raise ConfigError(f'train_cfg.max_skipped_steps={max_skipped!r}: expected the number of steps, 0 for none')
        self.file, self.hub, self.max_skipped = file, hub, max_skipped

    @property
    def skipped(self) -> int:
        """Steps of the run that were skipped so far, before a resume included."""
        history = self.hub.log_scalars.get(SKIPPED)
        return 0 if history is None else int(history.current())

    def meet(self, found: list[NonFinite], *, iteration: int, epoch: int, rank: int) -> None:
        """Write down what this rank found in a step, and skip the step or end the run. Every rank calls it.

        Args:
            found: of this rank; empty if it was another one.
            iteration: the step, counted from 1.
            epoch: of the data.
            rank: of this process.

        Raises:
            TrainingError: too many steps were skipped.
        """
        everything = ranks.gather(found, what=f'telling what is not finite at iteration {iteration}')
        of_all = [NonFinite(*one) for rank_found in everything for one in rank_found]
        with ranks.together(f'writing {self.file}'):
            if rank == 0:
                at = dict(iteration=iteration, epoch=epoch)
                append_lines(self.file, [at | one._asdict() for one in of_all])
        what = _in_words(of_all, iteration=iteration)
        if self.skipped >= self.max_skipped:
            message = f'{what}; no weight was changed by this step{self._what_to_do()}'
            ranks.fail_everywhere(TrainingError(message))
        self.hub.update_scalar(SKIPPED, self.skipped + 1)
        logger.warning('%s; skipped, %d of at most %d such steps', what, self.skipped, self.max_skipped)

    def _what_to_do(self) -> str:
        before = f', and {self.skipped} were skipped before it' if self.skipped else ''
        return (
            f'{before}. Look at the samples ({self.file} names all of them), or lower lr; --resume goes on from the '
            f'last checkpoint, and past this step with train_cfg.max_skipped_steps={self.skipped + 1}'
        )


def non_finite_losses(losses: Tensor, *, packs: Sequence[Any], dataset: Any, rank: int) -> list[NonFinite]:
    """The micro-batches of this rank whose loss is not finite.

    Args:
        losses: float64[K], of the micro-batches.
        packs: their samples.
        dataset: of the samples.
        rank: of this process.
    """
    return [
        NonFinite(rank, 'loss', at, str(loss), places(dataset, pack))
        for at, (loss, pack) in enumerate(zip(losses.tolist(), packs, strict=True))
        if not math.isfinite(loss)
    ]


def non_finite_norm(norm: float, *, packs: Sequence[Any], dataset: Any, rank: int) -> list[NonFinite]:
    """A norm of gradients that is not finite, though every loss is: it can come from any sample of the step."""
    samples = [place for pack in packs for place in places(dataset, pack)]
    return [NonFinite(rank, 'norm of the gradients', None, str(norm), samples)]


def only_finite(tensors: Iterable[tuple[str, Tensor]], *, iteration: int) -> Iterator[tuple[str, Tensor]]:
    """Hands on the weights that are to be saved, all of them: other ranks may have to take part in each.

    An update can be too large for its weights though loss and gradients were finite; the next step would show it.

    Args:
        tensors: names and float32 tensors on the CPU.
        iteration: steps that were done.

    Raises:
        TrainingError: at the end, if a weight is not finite.
    """
    bad: list[str] = []
    for name, tensor in tensors:
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # one reads less, and nearly always decides
            bad.append(name)
        yield name, tensor
    if bad:
        more = f' and {len(bad) - 1} more tensors' if len(bad) > 1 else ''
        raise TrainingError(
            f'{bad[0]}{more} hold numbers that are not finite after iteration {iteration}, so it is not saved; '
            'lower lr, or set optim_wrapper.clip_grad; --resume goes on from the last checkpoint'
        )


def _in_words(found: list[NonFinite], *, iteration: int) -> str:
    if not found:
        return f'the loss of all ranks together is not finite at iteration {iteration}'
    first = found[0]
    if first.micro_batch is None:
        where = f'its samples: {in_words([place for one in found for place in one.samples])}'
    else:
        where = f'rank {first.rank}, micro-batch {first.micro_batch}: {in_words(first.samples)}'
        where += f'; {len(found)} micro-batches in all' if len(found) > 1 else ''
    return f'the {first.kind} is {first.value} at iteration {iteration} ({where})'
