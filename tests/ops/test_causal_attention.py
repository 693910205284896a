"""causal_attention against the written-out softmax in float64, forward and gradients, and its promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from numerics import DEVICES, assert_as_accurate, forward_and_grads

from pgolf_kernels import causal_attention
from pgolf_kernels.ops.causal_attention import op

# B, T, H, Hkv, d: one token, in a batch, as PyTorch is often exact by luck on a few numbers; plain heads; GQA with an
# odd length; one shared head, odd batch; a real layer's heads
SHAPES = [(50, 1, 1, 1, 8), (2, 16, 4, 4, 16), (2, 33, 4, 2, 16), (3, 17, 3, 1, 8), (1, 130, 8, 4, 64)]


def written_out(q, k, v, exclude_self):
    """The definition, heads repeated and the mask explicit, in the dtype of q."""
    groups, T = q.shape[2] // k.shape[2], q.shape[1]
    k_rep, v_rep = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)  # (B, T, H, d)
    scores = torch.einsum("bthd,bshd->bhts", q, k_rep) / math.sqrt(q.shape[3])
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    y = torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -math.inf).softmax(-1), v_rep)
    if exclude_self:
        v_unit = v_rep / v_rep.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        y = y - (y * v_unit).sum(-1, keepdim=True) * v_unit
    return y


def random_qkv(shape, dtype, device):
    B, T, H, Hkv, d = shape
    q, dy = (torch.randn(B, T, H, d, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(B, T, Hkv, d, device=device).to(dtype) for _ in range(2))
    return (q, k, v), dy


def largest_terms(q, k, v, dy):
    """Bounds on what is added on the way to y, dq, dk and dv; a flash backward subtracts dy . y from dy . v late."""
    longest_q, longest_k, longest_v, longest_dy = (t.norm(dim=-1).max().item() for t in (q, k, v, dy))
    # The score's gradient is dy.v less dy.y, each rounded on its own; they cancel where one token takes all weight.
    dscore = 2 * longest_dy * longest_v / math.sqrt(q.shape[3])
    own_value = longest_dy * longest_v / v.norm(dim=-1).min().item()  # from dividing by |v| in XSA
    heads = q.shape[2] // k.shape[2]
    return longest_v, dscore * longest_k, heads * dscore * longest_q, heads * max(longest_dy, own_value)


@pytest.mark.parametrize("impl", [i.name for i in op.IMPLS])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(impl, device, dtype, exclude_self, shape):
    qkv, dy = random_qkv(shape, dtype, device)
    chosen = next(i for i in op.IMPLS if i.name == impl)
    if reason := chosen.why_not(*qkv, exclude_self):
        pytest.skip(reason)
    got = forward_and_grads(lambda q, k, v: causal_attention(q, k, v, exclude_self, impl=impl), qkv, dy)
    eager = forward_and_grads(lambda q, k, v: written_out(q, k, v, exclude_self), qkv, dy)
    exact_inputs = tuple(t.double() for t in qkv)
    exact = forward_and_grads(lambda q, k, v: written_out(q, k, v, exclude_self), exact_inputs, dy.double())
    for ours, baseline, truth, scale in zip(got, eager, exact, largest_terms(*exact_inputs, dy.double()), strict=True):
        assert_as_accurate(ours, baseline, truth, scale)


def test_reference_is_exact_in_float64():
    qkv, dy = random_qkv((2, 33, 4, 2, 16), torch.float64, "cpu")
    got = forward_and_grads(lambda q, k, v: causal_attention(q, k, v, True, impl="reference"), qkv, dy)
    exact = forward_and_grads(lambda q, k, v: written_out(q, k, v, True), qkv, dy)
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_no_position_reads_the_future(device):
    (q, k, v), _ = random_qkv((1, 24, 4, 2, 16), torch.float32, device)
    before = causal_attention(q, k, v, exclude_self=True)
    for t in (q, k, v):
        t[:, 12:] = torch.randn_like(t[:, 12:])
    after = causal_attention(q, k, v, exclude_self=True)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("device", DEVICES)
def test_exclude_self_leaves_nothing_along_the_own_value(device):
    (q, k, v), _ = random_qkv((2, 19, 6, 2, 32), torch.float32, device)
    v[0, 5] = 0  # a zero value vector must not divide by zero
    y = causal_attention(q, k, v, exclude_self=True)
    along = (y.unflatten(2, (2, 3)) * F.normalize(v, dim=-1).unsqueeze(3)).sum(-1)
    assert torch.isfinite(y).all()
    assert along.abs().max() < 1e-5


@pytest.mark.parametrize("exclude_self", [False, True])
def test_compiles_to_one_graph(exclude_self):
    qkv, dy = random_qkv((2, 16, 4, 2, 16), torch.float32, "cpu")
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    got = forward_and_grads(lambda q, k, v: compiled(q, k, v, exclude_self), qkv, dy)
    want = forward_and_grads(lambda q, k, v: causal_attention(q, k, v, exclude_self), qkv, dy)
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 8), (2, 0, 2, 1, 8)], ids=str)
def test_empty(shape):
    (q, k, v), _ = random_qkv(shape, torch.float32, "cpu")
    assert causal_attention(q, k, v, exclude_self=True).shape == q.shape


def test_errors_say_what_and_why():
    q, kv = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"must be \(batch, tokens, heads, d\), got q \(4, 4, 8\)"):
        causal_attention(q[0], kv, kv)
    with pytest.raises(ValueError, match=r"multiple of the heads of k and v, got .*k \(1, 4, 3, 8\)"):
        causal_attention(q, torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8))
    with pytest.raises(ValueError, match=r"agree in batch, tokens and head dimension"):
        causal_attention(q, kv[:, :3], kv[:, :3])
    with pytest.raises(ValueError, match=r"k and v must have one shape"):
        causal_attention(q, kv, kv[:, :3])
    with pytest.raises(ValueError, match=r"one dtype, got q torch.float32, k torch.bfloat16"):
        causal_attention(q, kv.bfloat16(), kv.bfloat16())
    with pytest.raises(ValueError, match=r"unknown impl 'triton'"):
        causal_attention(q, kv, kv, impl="triton")
