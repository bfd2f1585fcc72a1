"""Cross entropy of a linear head, chunk by chunk, so that the whole logits never exist.

Letters: N positions that are learned, H hidden size, V vocabulary, C chunk.

The idea (compute the gradient of each chunk in the forward pass and keep only the two gradients) is that of
Cut Cross-Entropy's and Liger-Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of float32 logits; smaller ones slow the matrix products down


class _Grads(NamedTuple):
    """Where gradients are gathered; None: not wanted."""

    hidden: Tensor | None  # [N, H], of the dtype of the product: every row is written once
    weight: Tensor | None  # float32[V, H]: a sum over chunks
    bias: Tensor | None  # float32[V]


class _Buffers:
    """One chunk of logits: float32, and of the dtype of the product if that is another."""

    def __init__(self, hidden: Tensor, *, rows: int, vocabulary: int) -> None:
        self.exact = torch.empty(rows, vocabulary, dtype=torch.float32, device=hidden.device)
        self.rough = self.exact if hidden.dtype == torch.float32 else torch.empty_like(self.exact, dtype=hidden.dtype)


def _softmax_gradient(logits: Tensor, targets: Tensor, *, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Cross entropies, and in the place of the logits their gradient, but for one factor per row.

    That factor is left to the products with the gradient, whose results are smaller.

    Args:
        logits: float32[C, V], overwritten.
        targets: long[C].
        scale, softcap: see ``linear_cross_entropy``.

    Returns:
        float32[C] cross entropies; float32[C, 1], what to multiply the rows of ``logits`` with.
    """
    if scale != 1:
        logits.mul_(scale)
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = logits.square().neg_().add_(1)  # of softcap * tanh(logits / softcap)
        logits.mul_(softcap)
    index = targets[:, None]
    largest = logits.amax(-1, keepdim=True)
    wanted = logits.gather(1, index) - largest
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.scatter_add_(1, index, -total)
    if slope is not None:
        logits.mul_(slope)
    return (total.log() - wanted).flatten(), scale / total


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
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        matrix = weight.detach().to(hidden.dtype)
        grads = _Grads(
            torch.empty_like(hidden) if for_hidden else None,
            torch.zeros_like(weight, dtype=torch.float32) if for_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None,
        )
        buffers = _Buffers(hidden, rows=min(chunk, len(hidden)), vocabulary=len(weight))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                states, size = hidden[rows], len(hidden[rows])
                rough, exact = buffers.rough[:size], buffers.exact[:size]
                if bias is None:
                    torch.mm(states, matrix.t(), out=rough)
                else:
                    torch.addmm(bias.to(rough.dtype), states, matrix.t(), out=rough)
                if rough.dtype != exact.dtype:
                    exact.copy_(rough)
                losses, factor = _softmax_gradient(exact, targets[rows], scale=scale, softcap=softcap)
                loss += losses.sum()
                _gather(grads, rows, gradient=exact, rough=rough, factor=factor, states=states, matrix=matrix)
        ctx.grads = grads
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Nothing else may hold the buffers, or autograd would copy them into .grad instead of taking them.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError('the gradients of linear_cross_entropy were used up by an earlier backward pass')
        given = zip(grads, ctx.dtypes, strict=True)
        return (*(None if g is None else g.mul_(grad_output).to(dtype) for g, dtype in given), None, None, None, None)


def _gather(
    grads: _Grads, rows: slice, *, gradient: Tensor, rough: Tensor, factor: Tensor, states: Tensor, matrix: Tensor
) -> None:
    """Add one chunk to the gradients.

    Args:
        rows: of the chunk.
        gradient: float32[C, V], of the logits but for ``factor`` float32[C, 1].
        rough: a buffer [C, V] of the dtype of the product; may be ``gradient`` itself.
        states: [C, H].
        matrix: [V, H].
    """
    if all(grad is None for grad in grads):
        return
    if rough.dtype != gradient.dtype:
        rough.copy_(gradient.mul_(factor))
        factor = torch.ones_like(factor)
    if grads.hidden is not None:
        torch.mm(rough, matrix, out=grads.hidden[rows]).mul_(factor)
    if grads.weight is not None:
        scaled = (states * factor).to(states.dtype)
        if grads.weight.dtype == rough.dtype:
            grads.weight.addmm_(rough.t(), scaled)
        else:
            grads.weight.add_(torch.mm(rough.t(), scaled))
    if grads.bias is not None:
        grads.bias.addmv_(gradient.t(), factor.flatten())


def chunk_rows(vocabulary: int) -> int:
    """Positions whose float32 logits make one chunk."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def linear_cross_entropy(
    hidden: Tensor,
    *,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the cross entropies of logits against ``targets``.

    Logits are ``scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(logits / softcap)``. Peak memory is one
    chunk of float32 logits plus the gradients of what is trained. The result can be differentiated once.

    Args:
        hidden: float[N, H], only the positions that are learned.
        weight: float[V, H].
        targets: long[N], already shifted, every one in [0, V). N may be 0: the gradients are zeros then, not missing.
        bias: float[V] or None.
        chunk: positions per chunk; None: as many as keep a chunk at 64 MiB.
        scale: of the logits (Granite).
        softcap: the bound of the logits (Gemma 2); None: unbounded.

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
    rows = chunk_rows(len(weight)) if chunk is None else chunk
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, scale, softcap)
