"""The chunked head equals ``F.cross_entropy`` over whole logits, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmtune.ops import linear_cross_entropy
from vlmtune.ops.cross_entropy import CHUNK_BYTES

N, H, V = 11, 16, 37


def leaves(dtype=torch.float32, *, bias=True):
    torch.manual_seed(0)
    tensors = [torch.randn(N, H), torch.randn(V, H) / 2, torch.randn(V) if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def reference(hidden, weight, bias, targets, transform=None):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(transform(logits) if transform else logits, targets, reduction='sum')


@pytest.fixture
def targets():
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('chunk', [1, 4, 11, 512])
@pytest.mark.parametrize('bias', [True, False])
def test_value_and_gradients(chunk, bias, targets):
    mine, theirs = leaves(bias=bias), leaves(bias=bias)
    loss = linear_cross_entropy(mine[0], weight=mine[1], bias=mine[2], targets=targets, chunk=chunk)
    expected = reference(*theirs, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    for a, b in zip(mine, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)  # the order of float32 sums


@pytest.mark.parametrize(
    ('settings', 'transform'),
    [
        (dict(scale=1 / 8), lambda logits: logits / 8),
        (dict(softcap=3.0), lambda logits: 3 * torch.tanh(logits / 3)),
        (dict(scale=2.0, softcap=3.0), lambda logits: 3 * torch.tanh(2 * logits / 3)),
    ],
    ids=['scaled', 'capped', 'both'],
)
def test_scale_and_cap_take_part_in_the_gradients(settings, transform, targets):
    mine, theirs = leaves(), leaves()
    loss = linear_cross_entropy(mine[0], weight=mine[1], bias=mine[2], targets=targets, chunk=4, **settings)
    expected = reference(*theirs, targets, transform)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient(targets):
    mine, theirs = leaves(), leaves()
    mine[1].requires_grad_(False)
    mine[2].requires_grad_(False)
    linear_cross_entropy(mine[0], weight=mine[1], bias=mine[2], targets=targets).backward()
    reference(*theirs, targets).backward()
    assert mine[1].grad is None
    assert mine[2].grad is None
    torch.testing.assert_close(mine[0].grad, theirs[0].grad, rtol=1e-5, atol=1e-6)


def test_frozen_hidden_states_still_train_the_head(targets):
    mine, theirs = leaves(), leaves()
    mine[0].requires_grad_(False)
    linear_cross_entropy(mine[0], weight=mine[1], bias=mine[2], targets=targets, chunk=4).backward()
    reference(*theirs, targets).backward()
    torch.testing.assert_close(mine[1].grad, theirs[1].grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_within_its_own_rounding(targets):
    """Logits are rounded to 8 bits of mantissa (2**-8 of about 6), as autocast rounds them; sums are float32."""
    mine, exact = leaves(torch.bfloat16), leaves()
    for a, b in zip(mine, exact, strict=True):
        b.data = a.detach().float()
    loss = linear_cross_entropy(mine[0], weight=mine[1], bias=mine[2], targets=targets, chunk=4)
    expected = reference(*exact, targets)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - expected) / expected < 2**-8
    for a, b in zip(mine, exact, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.float() - b.grad).abs().max() < 2**-6 * b.grad.abs().max()


def test_sums_over_chunks_are_float32():
    """2000 equal contributions to one gradient: in bfloat16 the sum would stand still at a fraction of it."""
    hidden, weight, bias = torch.ones(2000, 4), torch.zeros(8, 4), torch.zeros(8)
    leaves_ = [t.to(torch.bfloat16).requires_grad_() for t in (hidden, weight, bias)]
    linear_cross_entropy(
        leaves_[0], weight=leaves_[1], bias=leaves_[2], targets=torch.zeros(2000, dtype=torch.long), chunk=1
    ).backward()
    assert (leaves_[2].grad[1:].float() - 250).abs().max() < 1  # 2000 / 8, rounded to bfloat16
    assert (leaves_[1].grad[1:].float() - 250).abs().max() < 1


def test_autocast_rounds_the_head_and_returns_gradients_in_the_dtype_of_the_weights(targets):
    mine, theirs = leaves(), leaves()
    with torch.autocast('cpu', torch.bfloat16):
        loss = linear_cross_entropy(mine[0], weight=mine[1], bias=mine[2], targets=targets)
        logits = F.linear(*theirs)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), targets, reduction='sum')
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=2**-6, atol=2**-6 * b.grad.abs().max().item())  # bfloat16


def test_without_positions_every_leaf_gets_zeros_so_that_no_rank_waits_for_a_gradient():
    hidden, weight, bias = leaves()
    nothing = torch.zeros(0, dtype=torch.long)
    loss = linear_cross_entropy(hidden[:0], weight=weight, bias=bias, targets=nothing)
    assert loss.dtype == torch.float32
    assert loss == 0
    loss.backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """Notes the most elements that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        self.elements = max(self.elements, *(t.numel() for t in found if isinstance(t, torch.Tensor)))
        return result


def test_the_whole_logits_never_exist():
    """Nothing is larger than a chunk of logits or the head."""
    hidden, weight, bias = leaves()
    hidden = torch.randn(200, H, requires_grad=True)
    with Largest() as seen:
        linear_cross_entropy(
            hidden, weight=weight, bias=bias, targets=torch.zeros(200, dtype=torch.long), chunk=4
        ).backward()
    assert seen.elements == 200 * H > max(4 * V, V * H)


def test_chunks_are_sized_by_the_vocabulary():
    hidden, weight = torch.randn(300, 2), torch.randn(151_936, 2)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight=weight, targets=torch.zeros(300, dtype=torch.long))
    assert seen.elements == CHUNK_BYTES // 4 // 151_936 * 151_936


def test_the_gradient_of_the_head_is_handed_over_not_copied(targets):
    """It is as large as the head; a leaf's .grad is the very buffer that forward filled."""
    hidden, weight, _ = leaves()
    loss = linear_cross_entropy(hidden, weight=weight, targets=targets)
    buffer = loss.grad_fn.grads.weight.data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == buffer


def test_a_second_backward_pass_is_refused(targets):
    hidden, weight, _ = leaves()
    loss = linear_cross_entropy(hidden, weight=weight, targets=targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='used up by an earlier backward pass'):
        loss.backward()


def test_lengths_that_differ():
    hidden, weight, _ = leaves()
    with pytest.raises(ValueError, match='11 hidden states but 10 targets'):
        linear_cross_entropy(hidden, weight=weight, targets=torch.zeros(10, dtype=torch.long))
