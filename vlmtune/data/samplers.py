"""Which pack every rank takes at every micro-batch.

One global list of packs per epoch. Optimizer step s takes the next ``world_size * accumulative_counts`` of them; a rank
takes every ``world_size``-th of that group. So the samples of a step do not depend on how many ranks share it.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

from torch.utils.data import Sampler

from vlmtune.data.packing import Plan, plan_hash
from vlmtune.structures import SampleKey
from vlmtune.utils.errors import CheckpointError, DataError

Tail: TypeAlias = Literal['fill', 'drop']


class PackSampler(Sampler[list[SampleKey]]):
    """A batch sampler whose whole state is (epoch, packs consumed, hash of the plan).

    Args:
        plan: called as ``plan(epoch=...)``; the packs of that epoch, the same on every rank.
        accumulative_counts: micro-batches per rank and optimizer step.
        rank, world_size: of this process.
        tail: what becomes of the packs that do not fill a last step: 'fill' makes a smaller last step, topped up with
            fillers that weigh nothing; 'drop' leaves them out.

    Raises:
        DataError: there is not one pack, or with 'drop' not enough for one step.
    """

    endless = False

    def __init__(
        self,
        plan: Callable[..., Plan],
        *,
        accumulative_counts: int = 1,
        rank: int = 0,
        world_size: int = 1,
        tail: Tail = 'fill',
    ) -> None:
        self._make_plan = plan
        self.accumulative_counts = accumulative_counts
        self.rank, self.world_size = rank, world_size
        self.tail = tail
        self.epoch = 0
        self.consumed = 0  # packs of this epoch, over all ranks
        self.batch_size = 1  # packs per micro-batch; mmengine asks for it
        self._cached: tuple[int, Plan] | None = None  # of the current epoch
        self._counts: dict[int, int] = {}  # packs of every epoch that was planned
        if self.steps_in_epoch(0) == 0:
            raise DataError(
                f'{len(self.plan)} packs of samples do not make one optimizer step of {self.packs_per_step}'
            )

    @property
    def packs_per_step(self) -> int:
        """Packs of a full optimizer step, over all ranks."""
        return self.world_size * self.accumulative_counts

    @property
    def plan(self) -> Plan:
        """The packs of the current epoch."""
        if self._cached is None or self._cached[0] != self.epoch:
            self._cached = (self.epoch, self._make_plan(epoch=self.epoch))
        return self._cached[1]

    def packs_in_epoch(self, epoch: int) -> int:
        """Packs of any epoch, over all ranks; counted once."""
        if epoch not in self._counts:
            self._counts[epoch] = len(self.plan if epoch == self.epoch else self._make_plan(epoch=epoch))
        return self._counts[epoch]

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        full, rest = divmod(self.packs_in_epoch(epoch), self.packs_per_step)
        return full + (1 if rest and self.tail == 'fill' else 0)

    def steps_so_far(self) -> list[int]:
        """Optimizer steps of every epoch before this one, and of this one up to where it stands.

        Counted in steps of this sampler's size, also where others have consumed the packs.
        """
        full, rest = divmod(len(self.plan) - self.consumed, self.packs_per_step)
        left = full + (1 if rest and self.tail == 'fill' else 0)
        return [self.steps_in_epoch(epoch) for epoch in range(self.epoch)] + [self.steps_in_epoch(self.epoch) - left]

    def next_step(self) -> int:
        """Micro-batches per rank of the next optimizer step; 0 at the end of the epoch."""
        left = len(self.plan) - self.consumed
        if left >= self.packs_per_step:
            return self.accumulative_counts
        return -(-left // self.world_size) if self.tail == 'fill' and left > 0 else 0

    def finish_step(self) -> None:
        """The packs of one optimizer step have been learned."""
        self.consumed = min(self.consumed + self.packs_per_step, len(self.plan))

    def start_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.consumed = epoch, 0

    def __len__(self) -> int:
        """Optimizer steps per epoch: what mmengine means by the length of a loader here."""
        return self.steps_in_epoch(self.epoch)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Micro-batches of this rank, from the first pack that was not consumed."""
        plan, epoch = self.plan, self.epoch
        for start in range(self.consumed, len(plan), self.packs_per_step):
            yield from self._share(plan, epoch=epoch, start=start)

    def current_packs(self) -> list[list[SampleKey]]:
        """This rank's micro-batches of the step that is being learned, until ``finish_step`` is called."""
        return self._share(self.plan, epoch=self.epoch, start=self.consumed)

    def _share(self, plan: Plan, *, epoch: int, start: int) -> list[list[SampleKey]]:
        """This rank's part of the step that begins with pack ``start``; empty if that step is left out."""
        group = plan[start : start + self.packs_per_step]
        if len(group) < self.packs_per_step and self.tail == 'drop':
            return []
        micro_batches = []
        for first in range(0, len(group), self.world_size):
            mine = first + self.rank
            pack, supervised = (group[mine], True) if mine < len(group) else (group[0], False)
            micro_batches.append([SampleKey(epoch, index, supervised) for index in pack])
        return micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, in plain numbers."""
        return dict(epoch=self.epoch, consumed=self.consumed, plan=plan_hash(self.plan))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; reads no sample.

        Raises:
            CheckpointError: the data, the lengths or the packing settings are not those of the saved run.
        """
        self.epoch, self.consumed = int(state['epoch']), int(state['consumed'])
        if (found := plan_hash(self.plan)) != state['plan']:
            raise CheckpointError(
                f'the data of this run is not that of the checkpoint (plan {found}, saved {state["plan"]}): '
                'a data file, the tokenizer, max_length, packing or seed differ; restore them, or use load_from'
            )
        if self.epoch < 0 or not 0 <= self.consumed <= len(self.plan):
            raise CheckpointError(
                f'the checkpoint stands at pack {self.consumed} of epoch {self.epoch}, which has {len(self.plan)} packs'
            )
