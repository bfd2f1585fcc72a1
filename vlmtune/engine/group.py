"""The ranks of a command, from reading its config until they part."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.config import Config

from vlmtune.engine import ranks
from vlmtune.engine.ranks import DEFAULT_BOUNDS
from vlmtune.engine.setup import Launcher, bounds_of, init_distributed, leave_distributed


@contextmanager
def in_group() -> Iterator[None]:
    """Inside, ranks join; at the end they leave. What ends one of them alone is told to the others."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        ranks.tell(error)
        ranks.linger(speaks=not getattr(error, 'told_by_first_rank', False))
        if not ranks.several():  # the connections to other ranks may wait for what never comes
            leave_distributed()
        raise
    except BaseException:
        leave_distributed()
        raise
    leave_distributed()


def read_together(read: Callable[[], Config], *, launcher: Launcher, with_strategy: bool = False) -> Config:
    """Read the config, join the other ranks, and tell once what is wrong with it.

    Args:
        read: gives the config; what it raises is raised.
        launcher: 'none', 'pytorch', 'slurm'.
        with_strategy: whether the ``strategy`` of the config will be built; it needs a group, if only of one.

    Raises:
        UserError: see ``read`` and ``init_distributed``.
    """
    failure: Exception | None = None
    cfg, bounds = Config(), DEFAULT_BOUNDS
    try:
        cfg = read()
        bounds = bounds_of(cfg)
    except Exception as error:  # raised below, when there is somebody to tell
        if launcher == 'none':
            raise
        failure = error
    init_distributed(launcher, alone=with_strategy and cfg.get('strategy') is not None, bounds=bounds)
    with ranks.together('reading the config'):
        if failure is not None:
            raise failure
    return cfg
