"""The training loop. One iteration is one optimizer step."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.runner import BaseLoop
from torch import Tensor
from torch.utils.data import DataLoader

from vlmtune.data import PackSampler
from vlmtune.engine.state import set_rng_state
from vlmtune.registry import LOOPS
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError, TrainingError

MicroBatch = dict[str, Tensor]


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
        if (max_epochs is None) == (max_steps is None):
            raise ConfigError(f'train_cfg: give max_epochs or max_steps, not both (got {max_epochs} and {max_steps})')
        self.sampler: PackSampler = dataloader.batch_sampler  # type: ignore[assignment]
        assert self.sampler.accumulative_counts == accumulative_counts
        self._max_iters = int(max_steps) if max_steps is not None else self._count_steps(float(max_epochs))  # type: ignore[arg-type]
        if self._max_iters < 1:
            given = f'max_epochs={max_epochs}' if max_steps is None else f'max_steps={max_steps}'
            raise ConfigError(f'train_cfg: {given} makes no optimizer step; an epoch has {len(self.sampler)}')
        self._max_epochs = max_epochs if max_epochs is not None else self._max_iters / len(self.sampler)
        self._iter = 0
        self.rng_to_restore: dict[str, Any] | None = None

    def _count_steps(self, epochs: float) -> int:
        whole = math.floor(epochs)
        steps = sum(self.sampler.steps_in_epoch(epoch) for epoch in range(whole))
        return steps + round((epochs - whole) * self.sampler.steps_in_epoch(whole)) if epochs > whole else steps

    # names that mmengine's hooks read
    epoch = property(lambda self: self.sampler.epoch)
    iter = property(lambda self: self._iter)
    max_epochs = property(lambda self: self._max_epochs)
    max_iters = property(lambda self: self._max_iters)
    step_tokens = 0  # tokens of the last step, over all ranks
    step_seconds = 0.0  # its time, waiting for data included, saving and sample answers not

    def run(self) -> torch.nn.Module:
        """Train to the end."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        steps = self._steps()
        self.runner.model.train()
        while self._iter < self._max_iters:
            started = time.perf_counter()
            micro_batches = next(steps)
            if self.rng_to_restore is not None:  # after hooks and workers have drawn from the generators
                set_rng_state(self.rng_to_restore)
                self.rng_to_restore = None
            self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=micro_batches)
            outputs = self._step(micro_batches)
            self.step_seconds = time.perf_counter() - started
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

    def _step(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        strategy = self.runner.strategy
        supervised, self.step_tokens = self._count_tokens(micro_batches)
        total = torch.zeros((), dtype=torch.float64, device=strategy.device)
        for i, batch in enumerate(micro_batches):
            batch = {name: tensor.to(strategy.device, non_blocking=True) for name, tensor in batch.items()}
            with strategy.micro_step(last=i == len(micro_batches) - 1):
                loss = strategy.forward(batch)
                strategy.backward(loss * (strategy.gradient_scale / supervised))
            total += loss.detach()
        all_reduce(total)
        loss_value = total.item() / supervised
        if not math.isfinite(loss_value):
            raise TrainingError(
                f'the loss is {loss_value} at iteration {self._iter + 1}; no weight was changed by this step. '
                'Lower lr, or resume from the last checkpoint with --resume'
            )
        return dict(loss=loss_value, grad_norm=strategy.optimizer_step())

    def _count_tokens(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        """Supervised tokens and all tokens of this step, over all ranks."""
        supervised = sum(int((batch['labels'][:, 1:] != IGNORE_INDEX).sum()) for batch in micro_batches)
        tokens = sum(batch.get('attention_mask', torch.ones_like(batch['input_ids'])).sum() for batch in micro_batches)
        counts = torch.tensor([supervised, int(tokens)], dtype=torch.float64, device=self.runner.strategy.device)
        all_reduce(counts)
        return max(counts[0].item(), 1.0), int(counts[1].item())
