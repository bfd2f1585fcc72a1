"""The Runner: builds a run from a config, in the order in which mistakes are cheapest, and saves and resumes it."""

import logging
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_dist_info, get_rank, master_only
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner, set_random_seed

from vlmtune.config import dump_config, redact_secrets
from vlmtune.data import Processor
from vlmtune.engine import ranks
from vlmtune.engine.build import build_data, build_model, build_validation
from vlmtune.engine.checkpoint import CONFIG_FILE
from vlmtune.engine.hooks.isolation import IsolationHook
from vlmtune.engine.optim import PartwiseOptimWrapperConstructor
from vlmtune.engine.precheck import build_custom_hooks
from vlmtune.engine.resuming import load_or_resume
from vlmtune.engine.run_layout import BAD_SAMPLES_FILE, VALIDATION_FOLDER, wait_for_own_second
from vlmtune.engine.saving import Saver
from vlmtune.engine.schedules import schedules_in_steps
from vlmtune.engine.sharded_loading import sharded_weights
from vlmtune.engine.strategies import DDPStrategy, SingleDeviceStrategy
from vlmtune.engine.trackers import Trackers, read_trackers
from vlmtune.engine.vision_cache import use_vision_cache
from vlmtune.registry import LOOPS
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import CheckpointError
from vlmtune.utils.log_format import LINE

logger = logging.getLogger(__name__)


class Runner(FlexibleRunner):
    """mmengine's FlexibleRunner with one training loop, checkpoints that are directories, and a resume that is exact.

    Attributes:
        processor: of the model; hooks use it.
        validations: ``iteration`` and the scores of every validation so far, oldest first. Here, because a run that
            makes none hands on those of the run that it resumes.
    """

    processor: Processor
    validations: list[dict[str, Any]]

    @classmethod
    def from_cfg(cls, cfg: Config, *, hooks: list[Hook] | None = None) -> 'Runner':
        """Build a run: first the data, whose mistakes cost seconds, then the model, then the rest.

        Args:
            cfg: of the run.
            hooks: of ``custom_hooks``, as ``check_settings`` has built them; None builds them.

        Raises:
            UserError: anything in the config, the data or the model that the user can mend.
        """
        set_random_seed(cfg.randomness.seed)  # new weights (LoRA) are a function of the seed
        bad_samples_file = Path(cfg.work_dir, BAD_SAMPLES_FILE)
        with ranks.together('planning the data'):
            if get_rank() == 0 and not cfg.get('resume'):
                bad_samples_file.unlink(missing_ok=True)
            processor, loader = build_data(cfg, bad_samples_file=bad_samples_file)
            bad_samples_file = Path(cfg.work_dir, VALIDATION_FOLDER, BAD_SAMPLES_FILE)
            validation = build_validation(cfg, processor=processor, bad_samples_file=bad_samples_file)
        with ranks.together('loading the model'), sharded_weights(cfg):
            model = build_model(cfg, processor=processor)
        if cfg.get('vision_cache') is not None:
            with ranks.together('filling the vision cache'):
                use_vision_cache(model, loader.dataset, folder=cfg.vision_cache, workers=loader.num_workers)
        strategy = cfg.get('strategy') or dict(type=DDPStrategy if get_dist_info()[1] > 1 else SingleDeviceStrategy)
        optim_wrapper = {'constructor': PartwiseOptimWrapperConstructor, **cfg.optim_wrapper}
        given = ('param_scheduler', 'train_cfg', 'default_hooks', 'load_from', 'resume', 'log_processor')
        options = {name: cfg[name] for name in given if cfg.get(name) is not None}
        experiment = cfg.get('experiment_name') or Path(cfg.filename or 'run').stem
        wait_for_own_second(Path(cfg.work_dir), experiment)
        runner = cls(
            model=model,
            work_dir=cfg.work_dir,
            experiment_name=experiment,
            train_dataloader=loader,
            optim_wrapper=optim_wrapper,
            strategy=strategy,
            launcher=cfg.get('launcher', 'none'),
            env_cfg=cfg.get('env_cfg', {}),
            log_level=cfg.get('log_level', 'INFO'),
            visualizer=cfg.get('visualizer'),
            default_scope=None,  # registries have no scopes here; a scope would outlive the run
            randomness=cfg.randomness,
            custom_hooks=build_custom_hooks(cfg) if hooks is None else hooks,
            cfg=redact_secrets(cfg),  # mmengine hands it to trackers
            **options,
        )
        runner.processor, runner.validations = processor, []
        if validation is not None:
            runner._val_loop = LOOPS.build(cfg.val_cfg, default_args=dict(runner=runner, **validation))
        if getattr(loader.collate_fn, 'pack', False):
            runner.register_hook(IsolationHook())
        return runner

    def build_visualizer(self, visualizer: Any = None) -> Any:
        """The trackers of the config, or the visualizer that it describes."""
        if visualizer is not None:
            return super().build_visualizer(visualizer)
        chosen = read_trackers(self.cfg.get('trackers'))
        return Trackers(chosen, folder=Path(self.log_dir), name=self.experiment_name)

    def train(self) -> Any:
        """Train; trackers are told how it ended."""
        try:
            return super().train()
        except BaseException:
            if isinstance(self.visualizer, Trackers):
                self.visualizer.close(failed=True)
            raise

    def build_train_loop(self, loop: Any) -> Any:
        """The loop; once its length is known, schedules in epochs become schedules in steps."""
        built = super().build_train_loop(loop)
        schedules: Any = self.param_schedulers  # type: ignore[has-type]
        if schedules is not None:
            steps, epochs = built.max_iters, built.max_epochs
            self.param_schedulers = schedules_in_steps(schedules, max_steps=steps, max_epochs=epochs)
        return built

    # ---- what mmengine prints and writes at the start, shorter

    def _log_env(self) -> None:
        for handler in self.logger.handlers:
            handler.setFormatter(LINE)
            if isinstance(handler, logging.FileHandler):
                logging.getLogger('vlmtune').addHandler(handler)
            elif isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)  # where our own lines go
        device = find_device()
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads'
        logger.info('device %s (%s), %d processes, seed %s', device, name, self.world_size, self.seed)

    def close(self) -> None:
        """What this process logs from now on is not of this run."""
        for handler in self.logger.handlers:
            logging.getLogger('vlmtune').removeHandler(handler)

    def register_default_hooks(self, hooks: Mapping[str, Any] | None = None) -> None:
        """The hooks of the config and no others; one that is None is left out."""
        for hook in (hooks or {}).values():
            if hook is not None:
                self.register_hook(hook)

    def get_hooks_info(self) -> str:
        """The hooks in the order in which they run, on one line."""
        return ', '.join(type(hook).__name__ for hook in self.hooks)

    @master_only
    def dump_config(self) -> None:
        """Write the resolved config into this run's log folder."""
        dump_config(self.cfg, Path(self.log_dir) / CONFIG_FILE)

    # ---- checkpoints

    @property
    def resume_setting(self) -> bool | str:
        """``resume`` of the config."""
        return self._resume

    @property
    def load_from(self) -> str | None:
        """``load_from`` of the config."""
        return self._load_from

    @cached_property
    def saver(self) -> Saver:
        """What writes the checkpoints."""
        return Saver(self)

    def save_checkpoint(self, out_dir: str, filename: str, *, save_optimizer: bool = True, **_: Any) -> None:
        """Write ``out_dir/filename/``; called by all ranks, between optimizer steps.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        self.saver.save(Path(out_dir, filename), save_optimizer=save_optimizer)

    def load_or_resume(self) -> None:
        """Resume from, or start from the weights of, a checkpoint, as ``resume`` and ``load_from`` say.

        Raises:
            CheckpointError: an explicit checkpoint is broken, foreign, or does not fit this run.
        """
        load_or_resume(self)

    def resume(self, *_: Any, **__: Any) -> None:
        """Closed: mmengine's resume executes a config that it finds inside the checkpoint.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError('use resume=PATH in the config, or --resume')

    def load_checkpoint(self, *_: Any, **__: Any) -> dict:
        """Closed: mmengine's loader unpickles.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError('use load_from=PATH in the config')
