"""How one optimizer step runs on one process and under DistributedDataParallel.

All strategies offer the same verbs. To the loop: ``micro_step``, ``forward``, ``backward``, ``optimizer_step``,
``drop_gradients``; and to the checkpoint: ``trainable_layout``, ``trainable_state``, ``load_trainable``,
``save_optimizer``, ``load_optimizer``, ``scaler_state``, ``load_scaler_state``. DeepSpeed's are in ``deepspeed.py``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine._strategy import DDPStrategy as MMEngineDDPStrategy
from mmengine._strategy import SingleDeviceStrategy as MMEngineSingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlmtune.engine.optim import StepOptimWrapper, unwrap
from vlmtune.engine.optimizer_state import load_optimizer_state, optimizer_file, save_optimizer_state, whole_units
from vlmtune.engine.trainable_file import TrainableFile
from vlmtune.registry import STRATEGIES
from vlmtune.utils.device import find_device
from vlmtune.utils.disk import Written
from vlmtune.utils.tensor_file import TensorLayout


class WholeWeights:
    """The verbs of a strategy whose ranks all hold every weight and the whole optimizer."""

    model: nn.Module
    optim_wrapper: StepOptimWrapper
    rank: int

    shards_weights = False  # whether a rank holds only a piece of each weight, so that all have to compute together

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return find_device()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch, a float32 scalar."""
        return self.model(**batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        self.optim_wrapper.scale_loss(loss).backward()

    def optimizer_step(self) -> float:
        """Clip, update, clear; returns the norm of the gradients before clipping.

        If the norm is not finite, no weight changes and the gradients are dropped.
        """
        return self.optim_wrapper.clip_and_step()

    @property
    def lowered_loss_scale(self) -> bool:
        """Whether the last step was dropped because of the loss scale of float16; the next one has a smaller scale."""
        return self.optim_wrapper.lowered_loss_scale

    def drop_gradients(self) -> None:
        """Forget what ``backward`` added since the last step."""
        self.optim_wrapper.zero_grad(set_to_none=True)

    def trainable_layout(self) -> dict[str, TensorLayout]:
        """What ``trainable_state`` will yield: names inside the transformers model, float32, shapes."""
        return unwrap(self.model).trainable_layout()

    def trainable_state(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights in float32 on the CPU, one after the other; every rank has to exhaust it.

        Tensors may share memory with the weights.
        """
        for name, parameter in unwrap(self.model).named_trainable().items():
            yield name, parameter.detach().float().cpu().contiguous()

    def load_trainable(self, path: Path) -> None:
        """Set the trained weights from a safetensors file with all of them.

        Raises:
            CheckpointError: the file is broken, or its names or shapes are not exactly those that train.
        """
        with TrainableFile(path, layout=self.trainable_layout()) as file, torch.no_grad():
            for name, parameter in unwrap(self.model).named_trainable().items():
                parameter.copy_(file.whole(name))

    def save_optimizer(self, directory: Path) -> dict[str, Written]:
        """Write the optimizer's state into ``directory``; all ranks call it, the first one writes.

        Returns:
            What this rank wrote, by names relative to ``directory``.

        Raises:
            OSError: it could not be written.
        """
        if self.rank != 0:
            return {}
        name, optimizer = optimizer_file(0), self.optim_wrapper.optimizer
        return {name: save_optimizer_state(directory / name, optimizer, units=whole_units(unwrap(self.model)))}

    def load_optimizer(self, directory: Path) -> None:
        """Read what ``save_optimizer`` of any strategy wrote. Only tensors and plain numbers are read.

        Raises:
            CheckpointError: it is another optimizer's, over other parameters, or cannot be brought into this layout.
        """
        load_optimizer_state(directory, self.optim_wrapper.optimizer, units=whole_units(unwrap(self.model)))

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's state as plain numbers; empty but for float16."""
        return self.optim_wrapper.scaler_state()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Set what ``scaler_state`` of any strategy returned."""
        self.optim_wrapper.load_scaler_state(state)


@STRATEGIES.register_module()
class SingleDeviceStrategy(WholeWeights, MMEngineSingleDeviceStrategy):
    """One process, one device."""

    gradient_scale = 1.0  # what undoes the averaging of gradients over ranks

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return to_device(model, self.device)

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """The context of one micro-batch; ``last`` is the one after which gradients are exchanged."""
        return nullcontext()


@STRATEGIES.register_module()
class DDPStrategy(WholeWeights, MMEngineDDPStrategy):
    """One process per device, gradients averaged by DistributedDataParallel. Works on the CPU with gloo, too."""

    @property
    def gradient_scale(self) -> float:
        """DDP divides by the number of ranks; the loss is already divided by the tokens of all ranks."""
        return float(self.world_size)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        device = self.device
        ids = [device.index] if device.type == 'cuda' else None
        return DistributedDataParallel(to_device(model, device), device_ids=ids, forward_sync_buffers=False)

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """Gradients are exchanged after the last micro-batch only."""
        return nullcontext() if last else self.model.no_sync()  # type: ignore[operator]


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on ``device``. Quantised weights already are where they belong and must not be moved."""
    return model if unwrap(model).quantization is not None and device.type != 'cpu' else model.to(device)
