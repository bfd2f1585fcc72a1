"""Cross entropy of a linear head, chunk by chunk, so that the whole logits never exist.

Letters: N positions that are learned, H hidden size, V vocabulary, C chunk.

The idea (compute the gradient of each chunk in the forward pass and keep only the two gradients) is that of
Cut Cross-Entropy's and Liger-Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LogitTransform = Callable[[Tensor], Tensor]


class _LinearCrossEntropy(torch.autograd.Function):
    """See ``linear_cross_entropy``. Backward only scales what forward computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        transform: LogitTransform | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        inputs = (hidden, weight, bias)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        cast = [None if t is None else t.to(hidden.dtype) for t in (weight, bias)]
        grads = [
            torch.zeros_like(t, dtype=torch.float32) if t is not None and need else None
            for t, need in zip(inputs, needs, strict=True)
        ]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                leaves = [
                    None if t is None else t.detach().requires_grad_(need)
                    for t, need in zip((hidden[rows], *cast), needs, strict=True)
                ]
                loss = _chunk_loss(leaves, targets[rows], transform)
            total += loss.detach()
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(torch.autograd.grad(loss, wanted)) if wanted else iter(())
            for i, grad in enumerate(grads):
                if grad is not None:
                    (grad[rows] if i == 0 else grad).add_(next(found))
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if g is None else (g * grad_output).to(dtype) for g, dtype in grads]
        return (*scaled, None, None, None)


def _chunk_loss(leaves: Sequence[Tensor | None], targets: Tensor, transform: LogitTransform | None) -> Tensor:
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    logits = F.linear(hidden, weight, bias).float()
    if transform is not None:
        logits = transform(logits)
    return F.cross_entropy(logits, targets, reduction='sum')


def linear_cross_entropy(
    hidden: Tensor,
    *,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int = 512,
    transform: LogitTransform | None = None,
) -> Tensor:
    """Sum of the cross entropies of ``transform(hidden @ weight.T + bias)`` against ``targets``.

    Peak memory is one chunk of logits (C x V float32, a few times over) plus the gradients of what is trained.

    Args:
        hidden: float[N, H], only the positions that are learned.
        weight: float[V, H].
        targets: long[N], already shifted, every one in [0, V). N may be 0: the gradients are zeros then, not missing.
        bias: float[V] or None.
        chunk: positions per chunk.
        transform: applied to the float32 logits, for families that scale or soft-cap them.

    Returns:
        float32 scalar: the sum, not the mean.

    Raises:
        ValueError: the lengths differ.
    """
    if len(hidden) != len(targets):
        raise ValueError(f'{len(hidden)} hidden states but {len(targets)} targets')
    # The Function casts the head to the dtype of its input, which autocast would have chosen for both.
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, transform)
