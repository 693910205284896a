"""The C++ attention kernel at every instruction-set level this CPU has: accuracy, memory safety, threads.

Shapes: one token, in a batch, because PyTorch is often exact by luck on a few numbers; T = 33 and d = 9 leave tails in
panels, vectors and pairs; T = 70 crosses blocks of rows for every level; T = 600 crosses a block of queries; d = 80 is
more than one panel and not a multiple of two.
"""

import pytest
import torch
from memory import Guarded, in_child
from numerics import LEVELS, assert_as_accurate

from pgolf_kernels import causal_attention, extension
from pgolf_kernels.ops.causal_attention import cpu, reference

pytestmark = pytest.mark.skipif(extension.cpu is None, reason=str(extension.WHY_NOT_CPU))
SHAPES = [(50, 1, 1, 1, 8), (2, 33, 4, 2, 9), (1, 70, 3, 1, 80), (1, 600, 2, 2, 16)]  # B, T, H, Hkv, d


def make(shape, dtype):
    B, T, H, Hkv, d = shape
    q, k, v, dy = (torch.randn(B, T, heads, d).to(dtype) for heads in (H, Hkv, Hkv, H))
    return q, k, v, dy


def ours(q, k, v, dy, exclude_self, isa):
    y, with_self, lse = cpu.forward(q, k, v, exclude_self, isa)
    saved = with_self if exclude_self else y
    return y, *cpu.backward(dy, q, k, v, saved, lse, exclude_self, isa)


def written_out(q, k, v, dy, exclude_self):
    """The definition with autograd's gradients, in the dtype of q."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    q, k, v = leaves
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(groups, 2)) * q.shape[3] ** -0.5
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    y = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(groups, 2))
    y = reference.exclude_own_value(y, v) if exclude_self else y
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_forward_and_backward(isa, shape, dtype, exclude_self, monkeypatch):
    inputs = make(shape, dtype)
    baseline = written_out(*inputs, exclude_self)
    exact = written_out(*(t.double() for t in inputs), exclude_self)
    fresh, like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: fresh(*size, **kw).fill_(torch.nan))  # every output written
    monkeypatch.setattr(torch, "empty_like", lambda t: like(t).fill_(torch.nan))
    found = ours(*inputs, exclude_self, isa)
    q, k, v, dy = (t.double().norm(dim=-1).max().item() for t in inputs)
    shortest_v, group, root = inputs[2].double().norm(dim=-1).min().item(), shape[2] // shape[3], shape[4] ** 0.5
    # Largest terms on the way: a score's gradient is dy.v less dy.y, and XSA divides by |v|.
    scales = (v, 2 * dy * v * k / root, 2 * group * dy * v * q / root, group * max(dy, dy * v / shortest_v))
    for value, base, truth, scale in zip(found, baseline, exact, scales, strict=True):
        assert_as_accurate(value, base, truth, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(dtype):
    """The row maximum is subtracted: scores of several hundred, where one key takes all the weight."""
    q, k, v, dy = make((1, 40, 1, 1, 16), dtype)
    q, k = 30 * q, 30 * k
    found, exact = ours(q, k, v, dy, False, ""), written_out(*(t.double() for t in (q, k, v, dy)), False)
    baseline = written_out(q, k, v, dy, False)
    assert all(torch.isfinite(t).all() for t in found)
    assert_as_accurate(found[0], baseline[0], exact[0], scale=v.double().norm(dim=-1).max().item())


def test_threads_and_batch_change_nothing():
    inputs = make((3, 70, 4, 2, 16), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(ours(*inputs, True, ""))
    finally:
        torch.set_num_threads(before)
    alone = ours(*(t[1:2] for t in inputs), True, "")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(results[0], alone, strict=True))


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_touches_nothing_beyond_its_arguments(isa, dtype, at_end, exclude_self):
    shape = (2, 33, 4, 2, 9)
    q, k, v, dy = make(shape, dtype)
    lse = torch.zeros(shape[0], shape[2], shape[1])

    def run():
        memory = [Guarded(t, at_end) for t in (q, k, v, q, q, lse, dy, q, k, v)]
        q_, k_, v_, y, with_self, lse_, dy_, dq, dk, dv = (g.address for g in memory)
        p = extension.cpu.CausalAttention(sizes=shape, bf16=dtype == torch.bfloat16, exclude_self=exclude_self)
        p.forward(q=q_, k=k_, v=v_, y=y, y_with_self=with_self if exclude_self else 0, lse=lse_, threads=1, isa=isa)
        p.backward(q=q_, k=k_, v=v_, dy=dy_, y_with_self=with_self, lse=lse_, dq=dq, dk=dk, dv=dv, threads=1, isa=isa)

    assert in_child(run) == 0


def test_a_nan_stays_where_causality_puts_it():
    q, k, v, _ = make((1, 40, 2, 1, 16), torch.bfloat16)
    q[0, 20, 1, 3] = torch.nan
    y = causal_attention(q, k, v, impl="cpu")
    bad = torch.isnan(y).any(-1)
    assert bad[0, 20, 1] and bad.sum() == 1


@pytest.mark.parametrize("sizes", [(0, 4, 2, 1, 8), (1, 0, 2, 1, 8), (1, 4, 0, 1, 8), (1, 4, 2, 1, 0)], ids=str)
def test_empty(sizes):
    q, k, v, dy = make(sizes, torch.float32)
    y, dq, dk, dv = ours(q, k, v, dy, True, "")
    assert y.shape == q.shape == dq.shape and dk.shape == k.shape
    assert not dk.any() and not dv.any()


def test_registered_for_autograd_and_compile():
    q, k, v, dy = (t.requires_grad_() for t in make((1, 20, 2, 1, 16), torch.float32))
    torch.library.opcheck(torch.ops.pgolf.causal_attention_cpu.default, (q, k, v, True))
    saved = cpu.forward(q.detach(), k.detach(), v.detach(), True)
    plain = tuple(t.detach() for t in (dy, q, k, v))
    torch.library.opcheck(torch.ops.pgolf.causal_attention_backward_cpu.default, (*plain, saved[1], saved[2], True))
    compiled = torch.compile(lambda q, k, v: causal_attention(q, k, v, True), fullgraph=True, backend="aot_eager")
    results = []
    for attention in (compiled, lambda q, k, v: causal_attention(q, k, v, True, impl="cpu")):
        y = attention(q, k, v)
        results.append((y, *torch.autograd.grad(y, (q, k, v), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strides_do_not_matter():
    q, k, v, dy = make((2, 20, 2, 1, 16), torch.bfloat16)
    want = ours(q, k, v, dy, True, "")
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dy)]
    assert all(torch.equal(a, b) for a, b in zip(want, ours(*strided, True, ""), strict=True))


def test_what_it_refuses():
    half = torch.zeros(1, 4, 2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"the C\+\+ kernel needs float32 or bfloat16 CPU tensors, got torch.float16"):
        causal_attention(half, half, half, impl="cpu")
