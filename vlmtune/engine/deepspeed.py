"""DeepSpeed ZeRO. The library is imported when a run uses it, and not before."""

import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from mmengine._strategy.base import BaseStrategy
from torch import Tensor, nn

from vlmtune.engine import zero
from vlmtune.engine.deepspeed_config import RunSettings, fill_config, read_config, zero_stage
from vlmtune.engine.optim import unwrap
from vlmtune.engine.optimizer_state import Unit, load_optimizer_state, optimizer_file, save_optimizer_state
from vlmtune.engine.strategies import to_device
from vlmtune.engine.trainable_file import TrainableFile
from vlmtune.registry import STRATEGIES
from vlmtune.utils.device import find_device
from vlmtune.utils.disk import Written
from vlmtune.utils.errors import CheckpointError, ConfigError
from vlmtune.utils.tensor_file import TensorLayout

logger = logging.getLogger(__name__)


def import_deepspeed() -> Any:
    """The library, and on PATH the ninja that it requires and looks for there alone, also where no venv is activated.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("--deepspeed needs the package deepspeed: pip install 'deepspeed'") from error
    if shutil.which('ninja') is None:
        with suppress(ImportError):  # conda's ninja is no module; what compiles nothing needs none
            from ninja import BIN_DIR

            os.environ['PATH'] = os.pathsep.join([os.environ.get('PATH', os.defpath), BIN_DIR])
    return deepspeed


@STRATEGIES.register_module()
class DeepSpeedStrategy(BaseStrategy):
    """ZeRO stages 1, 2 and 3, with offload to the CPU, as DeepSpeed's own configuration says.

    What the run's config says is taken from there: precision, clipping, batch size, accumulation, optimizer, schedule;
    see ``deepspeed_config.fill_config``. With dtype float16, weights and gradients are float16 and the loss is scaled
    as the block ``fp16`` says; that was run on a CPU only, where DeepSpeed has to be told that float16 is supported.

    Args:
        config: a preset ('zero2'), the path of a json file, or a dict.
        train_micro_batch_size_per_gpu: mmengine gives it; DeepSpeed wants it for its own records.
        kwargs: of mmengine's BaseStrategy.

    Raises:
        ConfigError: the configuration cannot be read.
    """

    def __init__(self, *, config: str | dict[str, Any], train_micro_batch_size_per_gpu: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.micro_batch_size = train_micro_batch_size_per_gpu
        self.config = read_config(config)
        self.lowered_loss_scale = False  # whether the last step was dropped because of the loss scale of float16

    @property
    def gradient_scale(self) -> float:
        """ZeRO averages over ranks; the loss is already divided by the tokens of all ranks."""
        return float(self.world_size)

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds only a piece of each weight, so that all have to compute together."""
        return zero_stage(self.config) == 3

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return find_device()

    def prepare(self, model: nn.Module, *, optim_wrapper: Any = None, param_scheduler: Any = None,
                compile: Any = False, dispatch_kwargs: dict[str, Any] | None = None) -> Any:  # fmt: skip
        """Build optimizer, engine and schedulers.

        Raises:
            ConfigError: DeepSpeed's configuration says something else than the run's.
        """
        self.dispatch_kwargs.update(dispatch_kwargs or {})
        deepspeed = import_deepspeed()
        if unwrap(model).dtype == torch.float16 and not deepspeed.get_accelerator().is_fp16_supported():
            raise ConfigError(
                "dtype='float16': DeepSpeed does not run it on this device; use bfloat16, or no DeepSpeed"
            )
        model = to_device(model, self.device)
        self.optim_wrapper = self.build_optim_wrapper(optim_wrapper, model)
        settings = RunSettings(
            dtype=unwrap(model).dtype,
            max_norm=self.optim_wrapper.max_norm,
            batch_size=self.micro_batch_size,
            optimizer=type(self.optim_wrapper.optimizer).__name__,
            optimizer_settings=self.optim_wrapper.optimizer.defaults,
        )
        self.model, self.optim_wrapper.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=self.optim_wrapper.optimizer, config=fill_config(self.config, settings)
        )
        self._zero = self.optim_wrapper.optimizer
        self._zero.loss_scaler.raise_error_at_min_scale = False  # the loop says what a step that is not finite means
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        self._prepared = True
        return self._prepared_components()

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return model  # prepare() does it: DeepSpeed wraps model and optimizer together

    def load_checkpoint(self, *_: Any, **__: Any) -> dict:
        """Closed, as are the two below: the Runner reads and writes checkpoint directories."""
        raise CheckpointError('checkpoints are read by the Runner: use load_from or resume in the config')

    resume = save_checkpoint = load_checkpoint

    # ---- a step

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """Gradients are exchanged after the last micro-batch only."""
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch, a float32 scalar."""
        return self.model(**batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``; the loop has divided by everything there is to divide by."""
        self.model.backward(loss, scale_wrt_gas=False)

    def optimizer_step(self) -> float:
        """Clip, update, clear; returns the norm of the gradients before clipping.

        If the norm is not finite, no weight changes and the gradients are dropped.
        """
        scaler = self._zero.loss_scaler
        can_be_lowered = scaler.dynamic and scaler.cur_scale > scaler.min_scale
        self.model.step()
        norm = float(self.model.get_global_grad_norm())
        self.lowered_loss_scale = can_be_lowered and not math.isfinite(norm)
        return norm

    def drop_gradients(self) -> None:
        """Forget what ``backward`` added since the last step."""
        zero.drop_gradients(self._zero)

    # ---- checkpoints

    def _units(self) -> list[Unit]:
        names = {id(parameter): name for name, parameter in unwrap(self.model).named_trainable().items()}
        return zero.zero_units(self._zero, names)

    def trainable_layout(self) -> dict[str, TensorLayout]:
        """What ``trainable_state`` will yield: names inside the transformers model, float32, shapes."""
        return unwrap(self.model).trainable_layout()

    def trainable_state(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights in float32 on the CPU, gathered one after the other; every rank has to exhaust it."""
        mine = defaultdict(list)
        for unit in self._units():
            for fragment in unit.fragments:
                mine[fragment.name].append((fragment, unit.tensor.detach().narrow(0, fragment.offset, fragment.numel)))
        for name, layout in self.trainable_layout().items():
            numel = math.prod(layout.shape)
            yield name, zero.full_weight(mine[name], numel=numel, device=self.device).view(layout.shape).cpu()

    def load_trainable(self, path: Path) -> None:
        """Set the trained weights from a safetensors file with all of them; every rank has to call it.

        Raises:
            CheckpointError: the file is broken, or its names or shapes are not exactly those that train.
        """
        with TrainableFile(path, layout=self.trainable_layout()) as file:
            for unit in self._units():
                for name, start, numel, offset in unit.fragments:
                    part = unit.tensor.detach().narrow(0, offset, numel)
                    part.copy_(file.stretch(name, start=start, numel=numel))
        zero.refresh_weights(self._zero)

    def save_optimizer(self, directory: Path) -> dict[str, Written]:
        """Write this rank's part of the optimizer's state into ``directory``; every rank has to call it.

        Returns:
            What this rank wrote, by names relative to ``directory``.

        Raises:
            OSError: it could not be written.
        """
        name = optimizer_file(self.rank)
        return {name: save_optimizer_state(directory / name, self._zero.optimizer, units=self._units())}

    def load_optimizer(self, directory: Path) -> None:
        """Read what ``save_optimizer`` of any strategy wrote. Only tensors and plain numbers are read.

        Raises:
            CheckpointError: it is another optimizer's, over other parameters, or cannot be brought into this layout.
        """
        load_optimizer_state(directory, self._zero.optimizer, units=self._units())
        if type(self._zero.optimizer).__name__ == 'DeepSpeedCPUAdam':
            logger.warning(
                'DeepSpeedCPUAdam keeps powers of its betas to itself: the run goes on to within rounding; '
                'torch.optim.AdamW(fused=True) goes on to the bit'
            )

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's state as plain numbers; empty but for float16."""
        return zero.scaler_state(self._zero)

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Set what ``scaler_state`` of any strategy returned."""
        zero.load_scaler_state(self._zero, state)
