"""The training loop. One iteration is one optimizer step."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.runner import BaseLoop
from torch import Tensor
from torch.utils.data import DataLoader

from vlmtune.data import PackSampler
from vlmtune.engine.flops import ModelFlops
from vlmtune.engine.memory import MemoryModel, Sharding, state_bytes_per_weight
from vlmtune.engine.optim import unwrap
from vlmtune.engine.out_of_memory import explain_out_of_memory, is_out_of_memory
from vlmtune.engine.state import set_rng_state
from vlmtune.engine.step_clock import StepClock, StepTimes
from vlmtune.registry import LOOPS
from vlmtune.structures import SampleKey
from vlmtune.utils.errors import ConfigError, TrainingError

MicroBatch = dict[str, Tensor]


class StepCounts(NamedTuple):
    """What one optimizer step learned, over all ranks; padding and fillers are left out."""

    supervised: int = 0  # tokens
    tokens: int = 0
    samples: int = 0
    flops: float = 0.0  # model FLOPs, see engine/flops.py


@LOOPS.register_module()
class TrainLoop(BaseLoop):
    """Runs optimizer steps until ``max_epochs`` or ``max_steps``.

    Each step learns ``accumulative_counts`` micro-batches per rank. The loss of a step is the sum of the token losses
    of all micro-batches on all ranks, divided by the number of supervised tokens in them: how samples fall into
    micro-batches and ranks does not change the gradient.

    Args:
        runner: the Runner.
        dataloader: a StepDataLoader.
        max_epochs: may be a fraction.
        max_steps: optimizer steps; exactly one of the two is given.
        accumulative_counts: the number that the data loader was built with.

    Raises:
        ConfigError: both or none of max_epochs and max_steps are given.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader,
        *,
        max_epochs: float | None = None,
        max_steps: int | None = None,
        accumulative_counts: int = 1,
    ) -> None:
        super().__init__(runner, dataloader)
        self.sampler: PackSampler = dataloader.batch_sampler  # type: ignore[assignment]
        assert self.sampler.accumulative_counts == accumulative_counts
        self._max_iters = count_steps(self.sampler, max_epochs=max_epochs, max_steps=max_steps)
        epochs = 1.0 if self.sampler.endless else self._max_iters / len(self.sampler)
        self._max_epochs = epochs if max_epochs is None else max_epochs
        self._iter = 0
        self.rng_to_restore: dict[str, Any] | None = None

    # names that mmengine's hooks read
    epoch = property(lambda self: self.sampler.epoch)
    iter = property(lambda self: self._iter)
    max_epochs = property(lambda self: self._max_epochs)
    max_iters = property(lambda self: self._max_iters)
    step_counts = StepCounts()  # of the last step, for hooks
    step_times = StepTimes()  # likewise; saving and sample answers not included

    def run(self) -> torch.nn.Module:
        """Train to the end."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        steps = self._steps()
        self.runner.model.train()
        model = unwrap(self.runner.model)
        self._flops, clock = ModelFlops(model), StepClock(model, device=self.runner.strategy.device)
        while self._iter < self._max_iters:
            clock.start()
            micro_batches = next(steps)
            if self.rng_to_restore is not None:  # after hooks and workers have drawn from the generators
                set_rng_state(self.rng_to_restore)
                self.rng_to_restore = None
            self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=micro_batches)
            outputs = self._step(micro_batches, clock)
            self.step_times = clock.stop()
            self.sampler.finish_step()
            self.runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=micro_batches, outputs=outputs)
            self._iter += 1
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _steps(self) -> Iterator[list[MicroBatch]]:
        """The micro-batches of one optimizer step after the other, across epochs."""
        while True:
            loader = iter(self.dataloader)
            while count := self.sampler.next_step():
                yield [next(loader) for _ in range(count)]
            self.runner.call_hook('after_train_epoch')
            self.sampler.start_epoch(self.sampler.epoch + 1)
            self.runner.call_hook('before_train_epoch')

    def _step(self, micro_batches: list[MicroBatch], clock: StepClock) -> dict[str, float]:
        packs = self.sampler.current_packs()
        self.step_counts = self._count(micro_batches, packs)
        clock.data_arrived()
        at = 0
        try:
            total = torch.zeros((), dtype=torch.float64, device=self.runner.strategy.device)
            for at, batch in enumerate(micro_batches):
                total += self._learn(batch, last=at == len(micro_batches) - 1)
                clock.micro_batch_done()
            loss = self._mean_loss(total)
            clock.learned()
            return dict(loss=loss, grad_norm=self.runner.strategy.optimizer_step())
        except RuntimeError as error:
            clock.cancel()
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(error, batch=micro_batches[at], pack=packs[at]) from error

    def _out_of_memory(self, error: RuntimeError, *, batch: MicroBatch, pack: list[SampleKey]) -> TrainingError:
        runner, strategy = self.runner, self.runner.strategy
        sharding = Sharding.from_deepspeed(getattr(strategy, 'config', {}), ranks=runner.world_size)
        state_bytes = state_bytes_per_weight(runner.cfg.optim_wrapper.optimizer)
        return explain_out_of_memory(
            error,
            memory=MemoryModel(unwrap(runner.model), state_bytes=state_bytes, sharding=sharding),
            dataset=self.dataloader.dataset,
            batch=batch,
            pack=pack,
            device=strategy.device,
            at=f'at iteration {self._iter + 1}',
        )

    def _learn(self, batch: MicroBatch, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; returns the sum of its losses."""
        strategy = self.runner.strategy
        batch = {name: tensor.to(strategy.device, non_blocking=True) for name, tensor in batch.items()}
        with strategy.micro_step(last=last):
            loss = strategy.forward(batch)
            strategy.backward(loss * (strategy.gradient_scale / max(self.step_counts.supervised, 1)))
        return loss.detach()

    def _mean_loss(self, total: Tensor) -> float:
        """The loss per supervised token of all ranks.

        Raises:
            TrainingError: it is not finite.
        """
        all_reduce(total)
        loss = total.item() / max(self.step_counts.supervised, 1)
        if not math.isfinite(loss):
            raise TrainingError(
                f'the loss is {loss} at iteration {self._iter + 1}; no weight was changed by this step. '
                'Lower lr, or resume from the last checkpoint with --resume'
            )
        return loss

    def _count(self, micro_batches: list[MicroBatch], packs: list[list[SampleKey]]) -> StepCounts:
        """What this step learns, over all ranks."""
        counts = torch.zeros(4, dtype=torch.float64)
        for batch, pack in zip(micro_batches, packs, strict=True):
            if any(key.supervised for key in pack):
                rows = self._flops.rows(batch)
                flops = self._flops.of_rows(rows).total
                counts += torch.tensor([rows.supervised, rows.tokens, len(pack), flops], dtype=torch.float64)
        counts = counts.to(self.runner.strategy.device)
        all_reduce(counts)
        supervised, tokens, samples, flops = counts.tolist()
        return StepCounts(int(supervised), int(tokens), int(samples), flops)


def count_steps(sampler: PackSampler, *, max_epochs: float | None = None, max_steps: int | None = None) -> int:
    """Optimizer steps of a run; the last epoch may be a fraction.

    Raises:
        ConfigError: both or none are given, or they make no step.
    """
    if (max_epochs is None) == (max_steps is None):
        raise ConfigError(f'train_cfg: give max_epochs or max_steps, not both (got {max_epochs} and {max_steps})')
    if max_epochs is None:
        steps, given = int(max_steps or 0), f'max_steps={max_steps}'
    else:
        whole, given = math.floor(max_epochs), f'max_epochs={max_epochs}'
        steps = sum(sampler.steps_in_epoch(epoch) for epoch in range(whole))
        steps += round((max_epochs - whole) * sampler.steps_in_epoch(whole)) if max_epochs > whole else 0
    if steps < 1:
        raise ConfigError(f'train_cfg: {given} makes no optimizer step; an epoch has {len(sampler)}')
    return steps
