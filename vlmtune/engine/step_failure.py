"""What to raise in place of an error of torch in the middle of a step."""

from typing import Any

from torch import Tensor
from torch import distributed as dist

from vlmtune.engine import ranks
from vlmtune.engine.memory import MemoryModel, Sharding, state_bytes_per_weight
from vlmtune.engine.optim import unwrap
from vlmtune.engine.out_of_memory import explain_out_of_memory
from vlmtune.structures import SampleKey
from vlmtune.utils.device import is_out_of_memory
from vlmtune.utils.errors import UserError

_OF_AN_EXCHANGE = ('gloo', 'Connection closed by peer', 'Connection reset by peer', 'NCCL', 'ProcessGroup', 'TCPStore')


def explain_step_failure(
    error: RuntimeError, *, runner: Any, batch: dict[str, Tensor], pack: list[SampleKey], iteration: int
) -> UserError | None:
    """Out of memory: which samples, and what would fit. A broken exchange between ranks: which rank. Otherwise None.

    Args:
        error: of forward, backward or update.
        runner: of the run.
        batch: the micro-batch under way.
        pack: its samples.
        iteration: counted from 1.
    """
    if is_out_of_memory(error):
        return _out_of_memory(error, runner=runner, batch=batch, pack=pack, iteration=iteration)
    if ranks.several() and is_of_an_exchange(error):
        return ranks.explain(error, what=f'learning iteration {iteration}')
    return None


def is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether an exchange of tensors failed; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _OF_AN_EXCHANGE)


def _out_of_memory(
    error: RuntimeError, *, runner: Any, batch: dict[str, Tensor], pack: list[SampleKey], iteration: int
) -> UserError:
    strategy = runner.strategy
    sharding = Sharding.from_deepspeed(getattr(strategy, 'config', {}), ranks=runner.world_size)
    state_bytes = state_bytes_per_weight(runner.cfg.optim_wrapper.optimizer)
    return explain_out_of_memory(
        error,
        memory=MemoryModel(unwrap(runner.model), state_bytes=state_bytes, sharding=sharding),
        dataset=runner.train_dataloader.dataset,
        batch=batch,
        pack=pack,
        device=strategy.device,
        at=f'at iteration {iteration}',
    )
