"""DeepSpeed ZeRO. The library is imported when a run uses it, and not before.

DeepSpeed loads its checkpoints with pickle switched on. Its ``CheckpointEngine`` is the supported seam where another
loader can stand; ours reads tensors, plain values and four named classes of DeepSpeed's own, and nothing else.
"""

import json
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine._strategy.base import BaseStrategy
from torch import Tensor, nn

from vlmtune.engine.optim import unwrap
from vlmtune.registry import STRATEGIES
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_TAG = 'deepspeed'


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("--deepspeed needs the package deepspeed: pip install 'deepspeed'") from error
    return deepspeed


def _safe_checkpoint_engine() -> Any:
    """DeepSpeed's checkpoint engine with a loader that cannot run code."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]

    class SafeCheckpointEngine(CheckpointEngine):
        """Saves with torch.save, loads with weights_only."""

        def __init__(self) -> None:
            super().__init__()
            self.name = 'vlmtune'

        def create(self, info: Any) -> None:
            """Nothing to prepare."""

        def save(self, state_dict: Any, path: str) -> None:
            torch.save(state_dict, path)

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)

        def commit(self, info: Any) -> bool:
            """The directory is committed as a whole, by its manifest."""
            return True

    return SafeCheckpointEngine()


@STRATEGIES.register_module()
class DeepSpeedStrategy(BaseStrategy):
    """ZeRO stages 1, 2 and 3, with offload, as the json configuration says.

    'auto' values are filled from the run: clipping from ``optim_wrapper.clip_grad``, precision from the model's dtype.
    Gradient accumulation is the loop's alone.

    Args:
        config: path of a json file, or a dict.
        train_micro_batch_size_per_gpu: mmengine gives it; DeepSpeed wants it for its own records.
        kwargs: of mmengine's BaseStrategy.
    """

    def __init__(self, *, config: str | dict[str, Any], train_micro_batch_size_per_gpu: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.micro_batch_size = train_micro_batch_size_per_gpu
        self.config = json.loads(Path(config).read_text('utf-8')) if isinstance(config, str) else dict(config)

    @property
    def gradient_scale(self) -> float:
        """ZeRO averages over ranks; the loss is already divided by the tokens of all ranks."""
        return float(self.world_size)

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds only a piece of each weight, so that all have to compute together."""
        return self.config.get('zero_optimization', {}).get('stage') == 3

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return find_device()

    def prepare(self, model: nn.Module, *, optim_wrapper: Any = None, param_scheduler: Any = None,
                compile: Any = False, dispatch_kwargs: dict[str, Any] | None = None) -> Any:  # fmt: skip
        """Build optimizer, engine and schedulers."""
        self.dispatch_kwargs.update(dispatch_kwargs or {})
        deepspeed = _import_deepspeed()
        model = model.to(self.device)
        self.optim_wrapper = self.build_optim_wrapper(optim_wrapper, model)
        self.model, self.optim_wrapper.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=self.optim_wrapper.optimizer, config=self._filled_config(unwrap(model).dtype)
        )
        self.model.checkpoint_engine = _safe_checkpoint_engine()
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        self._prepared = True
        return self._prepared_components()

    def _filled_config(self, dtype: torch.dtype) -> dict[str, Any]:
        max_norm = self.optim_wrapper.max_norm
        filled = {name: value for name, value in self.config.items() if value != 'auto'}
        filled.update(
            train_micro_batch_size_per_gpu=self.micro_batch_size,
            gradient_accumulation_steps=1,
            gradient_clipping=0.0 if math.isinf(max_norm) else max_norm,  # 0 means none
            bf16=dict(enabled=dtype == torch.bfloat16),
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
            steps_per_print=10**13,
        )
        filled.pop('train_batch_size', None)
        filled.pop('fp16', None)
        return filled

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return model  # prepare() does it: DeepSpeed wraps model and optimizer together

    def load_checkpoint(self, *_: Any, **__: Any) -> dict:
        """Closed, as are the two below: the Runner reads and writes checkpoint directories."""
        raise CheckpointError('checkpoints are read by the Runner: use load_from or resume in the config')

    resume = save_checkpoint = load_checkpoint

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
        """Clip, update, clear; returns the norm of the gradients before clipping."""
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return float('nan') if norm is None else float(norm)

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained weights in float32 by name, on the CPU; gathered, so every rank has to call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, parameter in unwrap(self.model).named_trainable().items():
            full = safe_get_full_fp32_param(parameter)
            state[name] = (parameter if full is None else full).detach().float().cpu().contiguous().clone()
        return state

    def save_optimizer(self, directory: Path) -> None:
        """Write DeepSpeed's sharded state; every rank writes its own shard."""
        self.model.save_checkpoint(str(directory), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        if self.rank == 0:
            for script in directory.glob('zero_to_*.py'):
                script.unlink()  # DeepSpeed adds programs; a checkpoint of ours holds data

    def load_optimizer(self, directory: Path) -> None:
        """Read what ``save_optimizer`` wrote."""
        self.model.load_checkpoint(str(directory), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False)
