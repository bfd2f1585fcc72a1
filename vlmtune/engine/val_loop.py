"""Validation while training: the loss of held-out rows, and scores of what the model answers to them.

Training does not notice: the mode of every module, random generators, gradients and the place in the data are as they
were. The scores of all validations so far are part of a checkpoint, so that whatever follows from them (the best
checkpoint, stopping early) is the same in a run that was resumed.
"""

import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import BaseLoop

from vlmtune.data import StepDataLoader
from vlmtune.engine import ranks
from vlmtune.engine.optim import unwrap
from vlmtune.engine.run_layout import PREDICTIONS_FILE, VALIDATION_FILE, VALIDATION_FOLDER
from vlmtune.engine.signals import SIGNALS
from vlmtune.engine.state import kept_rng
from vlmtune.engine.step_feed import MicroBatch, StepFeed, stop_all
from vlmtune.evaluation import Evaluator
from vlmtune.evaluation.generation import answering
from vlmtune.evaluation.prediction import predict
from vlmtune.evaluation.prediction_file import write_rows
from vlmtune.evaluation.questions import Questions
from vlmtune.registry import LOOPS
from vlmtune.structures import IGNORE_INDEX
from vlmtune.utils.errors import ConfigError
from vlmtune.utils.json_lines import append_lines

logger = logging.getLogger(__name__)


@LOOPS.register_module()
class ValLoop(BaseLoop):
    """Validates every ``interval`` optimizer steps and behind the last one.

    The loss is that of training: the sum over all learned tokens of all rows on all ranks, divided by their number, so
    that neither packing nor the number of ranks changes it (but for rounding). Scores are of answers that the model
    generates. ``validation/iter_N/predictions.jsonl`` gets every answer as it is made, and a run that is resumed in the
    middle goes on behind the last one. Every validation is a line of ``validation.jsonl`` in the work dir.

    A signal to stop is obeyed within a micro-batch of the loss or a batch of answers; the run that resumes then
    validates before it learns on.

    Args:
        runner: the Runner.
        dataloader: of the held-out rows, in micro-batches as in training, all of them once.
        evaluator: how questions are answered and scored.
        questions: the rows as questions; None: no answers are asked for, because there are no metrics.
        batch_size: questions that are answered together.
        interval: optimizer steps; None or -1 validates behind the last step only.
        at_start: also before the first step, to have something to compare with.
        limit: whoever opens the questions reads it: only the first rows are asked; None: all.

    Attributes:
        history: ``iteration`` and the scores of every validation so far, oldest first.

    Raises:
        ConfigError: an interval that is no number of steps.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: StepDataLoader,
        *,
        evaluator: Evaluator,
        questions: Questions | None = None,
        batch_size: int = 1,
        interval: int | None = None,
        at_start: bool = False,
        limit: int | None = None,
    ) -> None:
        super().__init__(runner, dataloader)
        self.check(interval=interval, limit=limit)
        self.evaluator, self.questions, self.batch_size = evaluator, questions, batch_size
        self.interval, self.at_start = interval, at_start
        self._feed = StepFeed(dataloader)

    history = property(lambda self: self.runner.validations)

    @staticmethod
    def check(*, interval: int | None = None, limit: int | None = None, **_: Any) -> None:
        """Tell whether these settings can be right.

        Raises:
            ConfigError: an interval or a limit that is none.
        """
        if interval is not None and (not isinstance(interval, int) or interval < 1) and interval != -1:
            raise ConfigError(
                f'val_cfg.interval={interval!r}: expected optimizer steps, or None for the last step only'
            )
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ConfigError(f'val_cfg.limit={limit!r}: expected a number of rows, or None for all')

    def due(self, iteration: int) -> bool:
        """Whether there should be a validation behind this step, and has been none."""
        if any(row['iteration'] == iteration for row in self.history):
            return False
        if iteration in (0, self.runner.max_iters):
            return iteration > 0 or self.at_start
        interval = self.interval or -1
        return interval > 0 and iteration % interval == 0

    # ---- a validation

    def run(self) -> list[float]:
        """Validate the weights as they are, and tell the hooks (``after_val``).

        Returns:
            for each of ``SIGNALS``, on how many ranks it has come meanwhile. If one has, there may be no validation.

        Raises:
            UserError: the data, a metric or another rank failed.
        """
        runner, started = self.runner, time.perf_counter()
        done = runner.train_loop.steps_done
        ranks.note(f'validating behind iteration {done}')
        runner.call_hook('before_val')
        with answering(unwrap(runner.model)), kept_rng():
            loss, flags = self._mean_loss(at=f'the validation behind iteration {done}')
            if loss is None:
                return flags
            scores = self._scores(Path(runner.work_dir, VALIDATION_FOLDER, f'iter_{done}', PREDICTIONS_FILE))
        if scores is None:
            return self._stopping()
        self.history.append(dict(iteration=done, loss=loss, **scores))
        if runner.rank == 0:
            self._record(self.history[-1], seconds=time.perf_counter() - started)
        runner.call_hook('after_val')
        return self._stopping()

    def _stopping(self) -> list[float]:
        return ranks.total(self.runner.train_loop.signals.flags(), what='telling whether to stop')

    @torch.no_grad()
    def _mean_loss(self, *, at: str) -> tuple[float | None, list[float]]:
        """The loss per learned token of all ranks, None if it was left because of a signal; and the signals."""
        runner, feed = self.runner, self._feed
        total, tokens = torch.zeros((), dtype=torch.float64, device=runner.strategy.device), 0
        flags = [0.0] * len(SIGNALS)
        feed.sampler.start_epoch(0)
        try:
            while not feed.epoch_ended():
                fetched = feed.fetch()
                failed = float(fetched.failure is not None)
                sums = ranks.total([failed, *runner.train_loop.signals.flags()], what=f'waiting for the data of {at}')
                if sums[0]:
                    stop_all(fetched.failure, at=at)
                if any(flags := sums[1:]):
                    return None, flags
                for batch in fetched.micro_batches:
                    tokens += int((batch['labels'][:, 1:] != IGNORE_INDEX).sum())
                    total += runner.strategy.forward(self._on_device(batch))
                feed.sampler.finish_step()
        finally:
            feed.close()
        shares = ranks.gather((total.item(), tokens), what=f'adding up the losses of {at}')
        return sum(loss for loss, _ in shares) / max(sum(count for _, count in shares), 1), flags

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        return {name: tensor.to(self.runner.strategy.device, non_blocking=True) for name, tensor in batch.items()}

    def _scores(self, file: Path) -> dict[str, float] | None:
        """Of the answers, the same on every rank; None if they were left because of a signal."""
        if self.questions is None:
            return {}
        runner, model, what = self.runner, unwrap(self.runner.model), 'answering the held-out questions'
        scores: dict[str, float] | None = None
        with ranks.together(what):
            rows = predict(
                model.model, runner.processor, self.questions, file=file, batch_size=self.batch_size,
                generation=self.evaluator.generation, autocast_dtype=model.dtype, rank=runner.rank,
                world_size=runner.world_size, gather=partial(ranks.gather, what=what),
                synced=runner.strategy.shards_weights,
                should_stop=lambda: any(runner.train_loop.signals.flags()), tell=ranks.tell,
            )  # fmt: skip
            if rows is not None and runner.rank == 0:
                scores = self.evaluator.scores(rows)
                write_rows(file, [{**row, 'scores': self.evaluator.row_scores(row)} for row in rows])
        return ranks.gather(scores, what='telling the scores')[0]

    def _record(self, row: Mapping[str, Any], *, seconds: float) -> None:
        runner = self.runner
        scores = {name: value for name, value in row.items() if name != 'iteration'}
        samples = len(self.dataloader.dataset)
        said = '  '.join(f'{name} {value:.4f}' for name, value in scores.items())
        logger.info('validation behind step %d: %s  (%d samples, %.1f s)', row['iteration'], said, samples, seconds)
        runner.visualizer.add_scalars({f'val/{n}': value for n, value in scores.items()}, step=row['iteration'])
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        rules = {name: self.evaluator.rule_of(name) for name in finite}
        line = dict(
            iteration=row['iteration'], epoch=runner.epoch, **finite, seconds=seconds, samples=samples, rules=rules
        )
        append_lines(Path(runner.work_dir, VALIDATION_FILE), [line])
