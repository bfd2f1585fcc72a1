"""The training loop. One iteration is one optimizer step."""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.runner import BaseLoop
from torch import Tensor
from torch.utils.data import DataLoader

from vlmtune.data import PackSampler
from vlmtune.engine import ranks
from vlmtune.engine.flops import ModelFlops
from vlmtune.engine.hooks.checkpoint import CheckpointHook
from vlmtune.engine.non_finite import NON_FINITE_FILE, NonFiniteGuard, non_finite_losses, non_finite_norm
from vlmtune.engine.optim import unwrap
from vlmtune.engine.signals import SIGNALS, StopSignals
from vlmtune.engine.state import set_rng_state
from vlmtune.engine.step_clock import StepClock, StepTimes
from vlmtune.engine.step_failure import explain_step_failure
from vlmtune.engine.step_feed import Fetched, MicroBatch, StepFeed, stop_all
from vlmtune.engine.validation_history import tidy_validations
from vlmtune.registry import LOOPS
from vlmtune.structures import SampleKey
from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


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

    Ranks meet once per step on the CPU: they add up what the step learns, whether one has no data, and whether one was
    asked to stop. The host reads from the device twice per step: the loss before the update, so that one that is not
    finite changes nothing, and the norm of the gradients in ``optimizer_step``. ``StepClock`` waits once more, at the
    end. Nothing is read per micro-batch.

    Args:
        runner: the Runner.
        dataloader: a StepDataLoader.
        max_epochs: may be a fraction.
        max_steps: optimizer steps; exactly one of the two is given.
        accumulative_counts: the number that the data loader was built with.
        max_skipped_steps: steps of the run whose loss or gradients may be not finite; see NonFiniteGuard.

    Raises:
        ConfigError: both or none of max_epochs and max_steps are given, or max_skipped_steps is no number of steps.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader,
        *,
        max_epochs: float | None = None,
        max_steps: int | None = None,
        accumulative_counts: int = 1,
        max_skipped_steps: int = 0,
    ) -> None:
        super().__init__(runner, dataloader)
        self._feed = StepFeed(dataloader)
        self.sampler: PackSampler = self._feed.sampler
        assert self.sampler.accumulative_counts == accumulative_counts
        self._max_iters = count_steps(self.sampler, max_epochs=max_epochs, max_steps=max_steps)
        epochs = 1.0 if self.sampler.endless else self._max_iters / len(self.sampler)
        self._max_epochs = epochs if max_epochs is None else max_epochs
        self._iter = 0
        self._learned = False  # whether the step under way has been learned
        self.rng_to_restore: dict[str, Any] | None = None
        file = Path(runner.work_dir, NON_FINITE_FILE)
        self._guard = NonFiniteGuard(file, hub=runner.message_hub, max_skipped=max_skipped_steps)

    # names that mmengine's hooks read
    epoch = property(lambda self: self.sampler.epoch)
    iter = property(lambda self: self._iter)
    max_epochs = property(lambda self: self._max_epochs)
    max_iters = property(lambda self: self._max_iters)
    steps_done = property(lambda self: self._iter + self._learned)  # also in hooks, where ``iter`` still lags behind
    step_counts = StepCounts()  # of the last step, for hooks
    step_times = StepTimes()  # likewise; saving and sample answers not included
    stop_training = False  # a hook sets it where a step has ended
    skipped_step = False  # whether the last step was left out because something in it was not finite

    def run(self) -> torch.nn.Module:
        """Train to the end.

        Raises:
            Stopped: a signal asked for it; what was learned is saved.
            UserError: data, loss, memory or another rank failed.
        """
        runner = self.runner
        with StopSignals(requeue_exit_code=runner.cfg.get('requeue_exit_code')) as self.signals:
            try:
                self._read_earlier_validations()
                runner.call_hook('before_train')
                runner.call_hook('before_train_epoch')
                runner.model.train()
                model = unwrap(runner.model)
                self._flops, self._clock = ModelFlops(model), StepClock(model, device=runner.strategy.device)
                self._validate()  # one that is due may have been interrupted by a kill
                if self._iter >= self._max_iters:
                    logger.warning(
                        'nothing is left to train: iteration %d of %d is done; raise max_epochs or max_steps to go on',
                        self._iter,
                        self._max_iters,
                    )
                while self._iter < self._max_iters and not self.stop_training:
                    self._one_iteration()
                    self._validate()
                runner.call_hook('after_train_epoch')
                runner.call_hook('after_train')
            finally:
                self._feed.close()
        return runner.model

    def _one_iteration(self) -> None:
        """One optimizer step and all that goes with it."""
        runner, clock = self.runner, self._clock
        clock.start()
        while self._feed.epoch_ended():
            runner.call_hook('after_train_epoch')
            self._feed.start_epoch()
            runner.call_hook('before_train_epoch')
        ranks.note(f'loading the data of iteration {self._iter + 1}')
        fetched = self._feed.fetch()
        flags = self._meet(fetched)
        clock.data_arrived()
        if self.rng_to_restore is not None:  # after hooks and workers have drawn from the generators
            set_rng_state(self.rng_to_restore)
            self.rng_to_restore = None
        batches = fetched.micro_batches
        runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=batches)
        ranks.note(f'learning iteration {self._iter + 1}')
        outputs = self._step(batches)
        self.step_times = clock.stop()
        self.sampler.finish_step()
        self._learned = True
        runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=batches, outputs=outputs)
        self._stop_if_asked(flags)
        self._iter, self._learned = self._iter + 1, False

    def _read_earlier_validations(self) -> None:
        """Before the hooks begin: they name and keep the best checkpoint."""
        with ranks.together('looking at earlier validations'):
            late = tidy_validations(self.runner)
        self.runner.validations += ranks.gather(late, what='telling the last validation')[0]

    def _validate(self) -> None:
        """Between two steps, where it is time."""
        loop = self.runner.val_loop
        if loop is not None and loop.due(self._iter):
            self._stop_if_asked(loop.run())

    def _meet(self, fetched: Fetched) -> list[float]:
        """Tell the other ranks what this one brings to the step; how many of them were asked to stop, by signal."""
        mine = self._count(fetched.micro_batches)
        failed = float(fetched.failure is not None)
        iteration = self._iter + 1
        sums = ranks.total(
            [failed, *self.signals.flags(), *mine], what=f'waiting for all to have the data of iteration {iteration}'
        )
        if sums[0]:
            stop_all(fetched.failure, at=f'iteration {iteration}')
        flags, counts = sums[1 : 1 + len(SIGNALS)], sums[1 + len(SIGNALS) :]
        supervised, tokens, samples, flops = counts
        self.step_counts = StepCounts(int(supervised), int(tokens), int(samples), flops)
        return flags

    def _count(self, micro_batches: list[MicroBatch]) -> StepCounts:
        """What this rank learns of the step."""
        supervised = tokens = samples = 0
        flops = 0.0
        for batch, pack in zip(micro_batches, self.sampler.current_packs() if micro_batches else [], strict=True):
            if any(key.supervised for key in pack):
                rows = self._flops.rows(batch)
                supervised, tokens, samples = supervised + rows.supervised, tokens + rows.tokens, samples + len(pack)
                flops += self._flops.of_rows(rows).total
        return StepCounts(supervised, tokens, samples, flops)

    def _stop_if_asked(self, flags: list[float]) -> None:
        """Where a step has ended: save and leave, if any rank was asked to."""
        asked = self.signals.asked(flags)
        if asked is None:
            return
        hook = next((hook for hook in self.runner.hooks if isinstance(hook, CheckpointHook)), None)
        saved = 'no checkpoint: the config has no CheckpointHook' if hook is None else hook.save(self.runner)
        self.signals.leave_saved(asked, iteration=self.steps_done, checkpoint=saved)

    # ---- the step

    def _step(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Learn; what is logged: loss and norm of the gradients, each only if it is finite."""
        packs = self.sampler.current_packs()
        at = 0
        try:
            losses = torch.zeros(len(micro_batches), dtype=torch.float64, device=self.runner.strategy.device)
            for at, batch in enumerate(micro_batches):
                losses[at] = self._learn(batch, last=at == len(micro_batches) - 1)
                self._clock.micro_batch_done()
            loss = self._mean_loss(losses)
            self._clock.learned()
            return self._update(loss, losses, packs=packs)
        except RuntimeError as error:
            self._clock.cancel()
            explained = explain_step_failure(
                error, runner=self.runner, batch=micro_batches[at], pack=packs[at], iteration=self._iter + 1
            )
            if explained is None:
                raise
            raise explained from error

    def _learn(self, batch: MicroBatch, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; returns the sum of its losses."""
        strategy = self.runner.strategy
        batch = {name: tensor.to(strategy.device, non_blocking=True) for name, tensor in batch.items()}
        with strategy.micro_step(last=last):
            loss = strategy.forward(batch)
            strategy.backward(loss * (strategy.gradient_scale / max(self.step_counts.supervised, 1)))
        return loss.detach()

    def _mean_loss(self, losses: Tensor) -> float:
        """The loss per supervised token of all ranks."""
        total = losses.sum()
        all_reduce(total)
        return total.item() / max(self.step_counts.supervised, 1)

    def _update(self, loss: float, losses: Tensor, *, packs: list[list[SampleKey]]) -> dict[str, float]:
        """Change the weights, unless loss or gradients are not finite.

        Args:
            loss: of all ranks.
            losses: float64[K], of this rank's micro-batches.
            packs: their samples.
        """
        strategy, rank = self.runner.strategy, self.runner.rank
        dataset = self.dataloader.dataset
        step = dict(iteration=self._iter + 1, epoch=self.epoch, rank=rank)
        self.skipped_step = not math.isfinite(loss)
        if self.skipped_step:
            strategy.drop_gradients()
            self._guard.meet(non_finite_losses(losses, packs=packs, dataset=dataset, rank=rank), **step)
            return {}
        norm = strategy.optimizer_step()
        if math.isfinite(norm):
            return dict(loss=loss, grad_norm=norm)
        self.skipped_step = not strategy.lowered_loss_scale  # float16 finds its scale that way
        if self.skipped_step:
            self._guard.meet(non_finite_norm(norm, packs=packs, dataset=dataset, rank=rank), **step)
        return dict(loss=loss)


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
