"""How one optimizer step runs on one process and under DistributedDataParallel.

Both offer the same verbs to the loop: ``micro_step``, ``forward``, ``backward``, ``optimizer_step``; and the same to
the checkpoint: ``trainable_state``, ``save_optimizer``, ``load_optimizer``. DeepSpeed's are in ``deepspeed.py``.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine._strategy import DDPStrategy as MMEngineDDPStrategy
from mmengine._strategy import SingleDeviceStrategy as MMEngineSingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlmtune.engine.optim import unwrap
from vlmtune.registry import STRATEGIES
from vlmtune.utils.device import find_device
from vlmtune.utils.errors import CheckpointError

OPTIMIZER_FILE = 'optimizer.pt'


@STRATEGIES.register_module()
class SingleDeviceStrategy(MMEngineSingleDeviceStrategy):
    """One process, one device."""

    gradient_scale = 1.0  # what undoes the averaging of gradients over ranks
    shards_weights = False  # whether a rank holds only a piece of each weight, so that all have to compute together

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return find_device()

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return _to_device(model, self.device)

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """The context of one micro-batch; ``last`` is the one after which gradients are exchanged."""
        return nullcontext()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch, a float32 scalar."""
        return self.model(**batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        loss.backward()

    def optimizer_step(self) -> float:
        """Clip, update, clear; returns the norm of the gradients before clipping."""
        return self.optim_wrapper.clip_and_step()

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained weights by name, on the CPU; every rank has to call it."""
        return trainable_state(self.model)

    def save_optimizer(self, directory: Path) -> None:
        """Write the optimizer's state into ``directory``; every rank has to call it."""
        if self.rank == 0:
            torch.save(self.optim_wrapper.optimizer.state_dict(), directory / OPTIMIZER_FILE)

    def load_optimizer(self, directory: Path) -> None:
        """Read what ``save_optimizer`` wrote. Only tensors and plain numbers are read; nothing in the file can run."""
        load_optimizer(self.optim_wrapper, directory)


@STRATEGIES.register_module()
class DDPStrategy(MMEngineDDPStrategy):
    """One process per device, gradients averaged by DistributedDataParallel. Works on the CPU with gloo, too."""

    shards_weights = False

    @property
    def gradient_scale(self) -> float:
        """DDP divides by the number of ranks; the loss is already divided by the tokens of all ranks."""
        return float(self.world_size)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return find_device()

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        device = self.device
        ids = [device.index] if device.type == 'cuda' else None
        return DistributedDataParallel(_to_device(model, device), device_ids=ids, broadcast_buffers=False)

    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """Gradients are exchanged after the last micro-batch only."""
        return nullcontext() if last else self.model.no_sync()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch, a float32 scalar."""
        return self.model(**batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        loss.backward()

    def optimizer_step(self) -> float:
        """Clip, update, clear; returns the norm of the gradients before clipping."""
        return self.optim_wrapper.clip_and_step()

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained weights by name, on the CPU."""
        return trainable_state(self.model)

    def save_optimizer(self, directory: Path) -> None:
        """Write the optimizer's state into ``directory``; all ranks hold the same, the first one writes."""
        if self.rank == 0:
            torch.save(self.optim_wrapper.optimizer.state_dict(), directory / OPTIMIZER_FILE)

    def load_optimizer(self, directory: Path) -> None:
        """Read what ``save_optimizer`` wrote."""
        load_optimizer(self.optim_wrapper, directory)


def _to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Quantised weights already are where they belong and must not be moved."""
    return model if unwrap(model).quantization is not None and device.type != 'cpu' else model.to(device)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights by their names inside the transformers model, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in unwrap(model).named_trainable().items()}


def load_optimizer(optim_wrapper: Any, directory: Path) -> None:
    """Load an optimizer's state with ``weights_only``.

    Raises:
        CheckpointError: it is another optimizer's, or over other parameters.
    """
    state = torch.load(directory / OPTIMIZER_FILE, map_location='cpu', weights_only=True)
    mine = optim_wrapper.optimizer.state_dict()
    if _layout(state) != _layout(mine):
        raise CheckpointError(
            f'{directory / OPTIMIZER_FILE} is the state of another optimizer or of other parts '
            f'({_in_words(state)}; this run has {_in_words(mine)}); '
            'use the config that made it, or load_from to start anew'
        )
    optim_wrapper.optimizer.load_state_dict(state)


def _layout(state: dict[str, Any]) -> list[tuple[int, list[str]]]:
    """Parameters and settings of every group; schedulers add ``initial_lr``."""
    return [(len(group['params']), sorted({*group} - {'initial_lr'})) for group in state['param_groups']]


def _in_words(state: dict[str, Any]) -> str:
    return ', '.join(f'{count} parameters with {" ".join(settings)}' for count, settings in _layout(state))
