"""Writes the checkpoints of a run: every rank its share, the first one what all have in common.

docs/checkpoint_format.md says what the files hold and who reads them.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmtune.config.dump import config_text
from vlmtune.engine import checkpoint, ranks
from vlmtune.engine.checkpoint import CONFIG_FILE, PROCESSOR_DIR, TRAINER_FILE, WEIGHTS_FILE, rng_file
from vlmtune.engine.memory import state_bytes_per_weight
from vlmtune.engine.non_finite import only_finite
from vlmtune.engine.optim import unwrap
from vlmtune.engine.schedules import schedule_states
from vlmtune.engine.state import message_state, rng_state, to_json
from vlmtune.utils.adapter_folder import ADAPTER_CONFIG
from vlmtune.utils.disk import Written, write_file
from vlmtune.utils.tensor_file import write_tensors

_PATIENCE = 30.0  # seconds that a network file system may take to show what another node wrote
_USUAL_STATE = 8.0  # bytes per weight: AdamW's


class Saver:
    """Saves a run, so that either the whole checkpoint is there or what was there before.

    Attributes:
        last: the iteration that was saved last; None before the first.

    Args:
        runner: a Runner; it is asked for its parts when they are needed.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.last: int | None = None
        self._unchanging: dict[str, bytes] = {}
        self._bytes_of_last: dict[bool, int] = {}  # with the optimizer or without: what such a checkpoint took

    def save(self, target: Path, *, save_optimizer: bool = True) -> None:
        """Write ``target``, an ``iter_N.pth``; all ranks call it, between optimizer steps.

        Raises:
            CheckpointError: it could not be written, on this rank; what was saved before is untouched.
            TrainingError: a weight is not finite; likewise.
            RankFailed: the same, on another rank.
            RankMissing: a rank has died or hangs.
        """
        staging, what = checkpoint.staging_of(target), f'saving {target.name}'
        try:
            with ranks.together(f'{what}: making room'), _as_checkpoint_error(target):
                if self._runner.rank == 0:
                    checkpoint.check_space(target.parent, self.needed_bytes(save_optimizer=save_optimizer))
                    checkpoint.start(target)
            with ranks.together(f'{what}: writing'), _as_checkpoint_error(target):
                written = self._write(staging, save_optimizer=save_optimizer)
            files: dict[str, Written] = {}
            for share in ranks.gather(written, what=f'{what}: comparing notes'):
                files |= share
            with ranks.together(f'{what}: closing it'), _as_checkpoint_error(target):
                if self._runner.rank == 0:
                    self._seal(target, files, resumable=save_optimizer)
        except Exception:
            checkpoint.discard(staging)  # by every rank: where the nodes share no disk, each has its own
            raise
        self.last = self._runner.train_loop.steps_done
        self._bytes_of_last[save_optimizer] = sum(entry.size for entry in files.values())

    def check_space(self, work_dir: Path, *, save_optimizer: bool) -> None:
        """Stop a run before its first step that could never save; all ranks call it.

        Raises:
            CheckpointError: how much is free and how much is needed.
        """
        first = work_dir / checkpoint.checkpoint_name(self._runner.train_loop.steps_done + 1)
        with ranks.together('looking for room for a checkpoint'), _as_checkpoint_error(first):
            if self._runner.rank == 0:
                checkpoint.check_space(work_dir, self.needed_bytes(save_optimizer=save_optimizer))

    def needed_bytes(self, *, save_optimizer: bool) -> int:
        """Bytes of the next checkpoint: what the last one took, or an estimate. The first rank knows."""
        if save_optimizer in self._bytes_of_last:
            return self._bytes_of_last[save_optimizer]
        weights = sum(entry.nbytes for entry in self._runner.strategy.trainable_layout().values())
        needed = weights + sum(map(len, self._unchanging_files().values()))
        if save_optimizer:
            try:
                per_weight = state_bytes_per_weight(self._runner.cfg.optim_wrapper.optimizer)
            except (RuntimeError, TypeError, ValueError):  # it takes no step over a single vector
                per_weight = _USUAL_STATE
            needed += int(per_weight * weights / 4)
        return needed

    # ---- what a rank writes

    def _write(self, staging: Path, *, save_optimizer: bool) -> dict[str, Written]:
        strategy, rank = self._runner.strategy, self._runner.rank
        written = {}
        if rank == 0:
            written[WEIGHTS_FILE] = self._write_weights(staging / WEIGHTS_FILE)
            for name, content in {**self._unchanging_files(), TRAINER_FILE: to_json(self._trainer_state())}.items():
                written[name] = write_file(staging / name, [content])
        else:
            _exhaust(strategy.trainable_state())
        if save_optimizer:
            written |= strategy.save_optimizer(staging)
        name, resumed = rng_file(rank), self._runner.train_loop.rng_to_restore
        state = rng_state() if resumed is None else resumed  # no step was learned since
        return {**written, name: write_file(staging / name, [to_json(state)])}

    def _write_weights(self, path: Path) -> Written:
        strategy = self._runner.strategy
        tensors = only_finite(strategy.trainable_state(), iteration=self._runner.train_loop.steps_done)
        try:
            return write_tensors(path, tensors, layout=strategy.trainable_layout(), metadata=dict(format='pt'))
        finally:
            _exhaust(tensors)  # also after a failure: the other ranks wait for our part of each

    def _unchanging_files(self) -> dict[str, bytes]:
        """Config, processor and adapter settings; made once, so that all checkpoints of a run hold the same."""
        if not self._unchanging:
            files = {CONFIG_FILE: config_text(self._runner.cfg).encode()}
            with tempfile.TemporaryDirectory() as folder:
                self._runner.processor.save(Path(folder, PROCESSOR_DIR))
                if (adapter := unwrap(self._runner.model).lora_config) is not None:
                    adapter.save_pretrained(folder)
                for path in Path(folder).rglob('*'):
                    name = path.relative_to(folder).as_posix()
                    if path.is_file() and (name == ADAPTER_CONFIG or name.startswith(PROCESSOR_DIR)):
                        files[name] = path.read_bytes()
            self._unchanging = files
        return self._unchanging

    def _trainer_state(self) -> dict[str, Any]:
        runner = self._runner
        loop = runner.train_loop
        return dict(
            iteration=loop.steps_done,
            seed=runner.seed,
            packs_per_step=loop.sampler.packs_per_step,
            sampler=loop.sampler.state_dict(),
            schedulers=schedule_states(runner.param_schedulers or []),
            scaler=runner.strategy.scaler_state(),
            validations=runner.validations,
            messages=message_state(runner.message_hub, window=runner.log_processor.window_size),
        )

    def _seal(self, target: Path, files: dict[str, Written], *, resumable: bool) -> None:
        world_size = self._runner.world_size
        meta = dict(iteration=self._runner.train_loop.steps_done, world_size=world_size, resumable=resumable)
        patience = _PATIENCE if world_size > 1 else 0.0
        checkpoint.seal(checkpoint.staging_of(target), target, files=files, meta=meta, patience=patience)
        checkpoint.point_to(target)


def _exhaust(tensors: Iterator[Any]) -> None:
    for _ in tensors:
        pass


@contextmanager
def _as_checkpoint_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise checkpoint.failure(target, error) from error
