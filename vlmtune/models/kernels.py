"""Liger's kernels, where asked for. They need a GPU; none was at hand where this was written, so it was not run."""

import logging

from transformers import PreTrainedModel
from transformers.utils import is_liger_kernel_available

from vlmtune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def check_liger(*, device: str) -> None:
    """Tell whether the kernels can run.

    Raises:
        ConfigError: the package is missing, or ``device`` is no GPU.
    """
    if device.partition(':')[0] in ('cpu', 'mps') or not is_liger_kernel_available():
        raise ConfigError(
            f'liger_kernel=True needs a GPU (this run is on {device}) and the package liger-kernel; '
            'install it, or set liger_kernel=False'
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Norms, rotary positions and MLPs of this one model; never the loss, which is ours.

    https://github.com/linkedin/Liger-Kernel, the function that Hugging Face's Trainer calls for a model it was given.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # noqa: PLC0415 - optional

    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    logger.info('liger kernels: applied to %s', type(model).__name__)
