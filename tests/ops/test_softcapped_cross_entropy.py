"""softcapped_cross_entropy: every implementation, loss and both gradients, against float64 and a hand-written formula.

Triton's kernel also runs under the interpreter (tests/test_triton_interpreter.py), so shapes stay small here.
"""

import pytest
import torch
from numerics import DEVICES, assert_as_accurate, forward_and_grads
from triton_cpu import record_ops  # under TRITON_INTERPRET=1 importing this module makes bfloat16 right

from pgolf_kernels import tiles
from pgolf_kernels.dispatch import TRITON_INTERPRETED
from pgolf_kernels.ops.softcapped_cross_entropy import op, reference, softcapped_cross_entropy

IMPL_NAMES = [i.name for i in op.IMPLS]
REDUCTIONS = ["mean", "sum", "none"]
# (tokens, D, V). One token, one word; odd vocabulary below a block; a power of two, two dimensions of tokens; a
# vocabulary just over a power of two, in rows that need padding.
SHAPES = [((1,), 3, 1), ((5,), 20, 67), ((3, 7), 16, 128), ((20,), 24, 1025)]
TRITON_DEVICES = ["cpu"] * TRITON_INTERPRETED + ["cuda"] * torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not TRITON_DEVICES, reason="Triton needs a CUDA GPU or TRITON_INTERPRET=1")


@pytest.fixture
def nan_filled_memory():
    """torch.empty and its kin return NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape, device, dtype=torch.float32, spread=8.0):
    """hidden, weight and targets with a third of them ignored (never all); logits of size `spread` before the cap."""
    tokens, D, V = shape
    hidden, weight = torch.randn(*tokens, D), spread * torch.randn(V, D) / D**0.5
    targets = torch.randint(V, tokens)
    targets[torch.rand(tokens) < 1 / 3] = -100
    targets.view(-1)[-1] = V - 1
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def why_not(impl, hidden, weight, targets, softcap=30.0, ignore_index=-100, reduction="mean"):
    chosen = next(i for i in op.IMPLS if i.name == impl)
    return chosen.why_not(hidden, weight, targets, softcap, ignore_index, reduction)


def check(impl, tensors, reduction="mean", softcap=30.0):
    """Loss and both gradients of the implementation, no worse than twice the reference in the same dtype."""
    hidden, weight, targets = tensors
    if reason := why_not(impl, *tensors, softcap):
        pytest.skip(reason)
    dloss = torch.rand(targets.shape if reduction == "none" else (), device=hidden.device) + 0.5

    def outputs(run, dtype):
        args = [t.to(dtype) for t in (hidden, weight)]
        return forward_and_grads(run, args, dloss.double() if dtype == torch.float64 else dloss)

    got = outputs(
        lambda h, w: softcapped_cross_entropy(h, w, targets, softcap, reduction=reduction, impl=impl), hidden.dtype
    )
    plain = [
        outputs(lambda h, w: reference.forward(h, w, targets, softcap, -100, reduction), dtype)
        for dtype in (hidden.dtype, torch.float64)
    ]
    # The loss is a difference of terms up to the width 2 * softcap of the logits' range. A gradient sums (p - onehot)
    # times weight or hidden, where p - onehot has the absolute error of float32, and is then rounded to its dtype.
    in_float32 = 4 * torch.finfo(torch.float32).eps / torch.finfo(hidden.dtype).eps
    scales = [2 * softcap * max(1.0, got[0].abs().max().item())]
    scales += [g.abs().max() + in_float32 * t.abs().max() for g, t in zip(plain[1][1:], (weight, hidden), strict=True)]
    for ours, theirs, true, scale in zip(got, *plain, scales, strict=True):
        assert_as_accurate(ours, theirs, true, scale=scale)


def by_hand(hidden, weight, targets, softcap):
    """nll per token from the definition, in float64, without any cross-entropy routine of PyTorch."""
    z = softcap * torch.tanh(hidden.double() @ weight.double().T / softcap)
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    nll = -p.gather(-1, targets.clamp(min=0)[..., None]).log().squeeze(-1)
    return nll * (targets != -100)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(impl, device, dtype, reduction, shape):
    check(impl, inputs(shape, device, dtype), reduction)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_definition(impl, device, reduction):
    hidden, weight, targets = inputs(((9,), 16, 40), device, torch.bfloat16, spread=1.0)
    if reason := why_not(impl, hidden, weight, targets):
        pytest.skip(reason)
    got = softcapped_cross_entropy(hidden, weight, targets, 3.0, reduction=reduction, impl=impl)
    want = by_hand(hidden, weight, targets, 3.0)
    want = {"none": want, "sum": want.sum(), "mean": want.sum() / (targets != -100).sum()}[reduction]
    torch.testing.assert_close(got.double(), want, rtol=4e-3, atol=2e-2)  # the product's bfloat16, logits about 1
    assert got.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [2.0, 40.0])
def test_saturated_logits(impl, device, softcap):
    """Logits far beyond the cap on both sides: nothing overflows, and the gradient of a saturated logit vanishes."""
    check(impl, inputs(((20,), 16, 96), device, torch.bfloat16, spread=400.0), softcap=softcap)


@pytest.mark.parametrize("device", DEVICES)
def test_reference_gradients_by_finite_differences(device):
    hidden, weight, targets = inputs(((4,), 3, 5), device, torch.float64)
    args = hidden.requires_grad_(), weight.requires_grad_()
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda h, w, r=reduction: softcapped_cross_entropy(h, w, targets, 5.0, reduction=r, impl="reference"), args
        )


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_ignored_tokens_get_zero(impl, device):
    """Any ignore_index, also one inside the vocabulary; all tokens ignored gives PyTorch's NaN mean and zero sum."""
    hidden, weight, targets = inputs(((30,), 16, 40), device, torch.bfloat16)
    if reason := why_not(impl, hidden, weight, targets):
        pytest.skip(reason)
    targets[:10] = 7
    ignored = (targets == 7) | (targets == -100)
    hidden.requires_grad_()
    loss = softcapped_cross_entropy(hidden, weight, targets.where(~ignored, 7), ignore_index=7, impl=impl)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert not dhidden[ignored].any() and dhidden[~ignored].abs().amax(-1).all()
    want = softcapped_cross_entropy(hidden, weight, targets.where(~ignored, -100), impl=impl)
    torch.testing.assert_close(loss, want, rtol=0, atol=0)
    nobody = torch.full_like(targets, -100)
    assert softcapped_cross_entropy(hidden, weight, nobody, impl=impl).isnan()
    assert softcapped_cross_entropy(hidden, weight, nobody, reduction="sum", impl=impl) == 0


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_some_gradients_only(impl, device):
    hidden, weight, targets = inputs(((33,), 24, 40), device, torch.bfloat16)
    if reason := why_not(impl, hidden, weight, targets):
        pytest.skip(reason)

    def grads(*needs):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((hidden, weight), needs, strict=True)]
        loss = softcapped_cross_entropy(*leaves, targets, impl=impl)
        return torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])

    every = grads(True, True)
    assert torch.equal(grads(True, False)[0], every[0]) and torch.equal(grads(False, True)[0], every[1])


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device):
    weight = torch.randn(6, 4, device=device, requires_grad=True)
    hidden = torch.empty(0, 4, device=device, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64, device=device)
    total = softcapped_cross_entropy(hidden, weight, targets, reduction="sum")
    dhidden, dweight = torch.autograd.grad(total, (hidden, weight))
    assert total == 0 and dhidden.shape == (0, 4) and not dweight.any()
    assert softcapped_cross_entropy(hidden, weight, targets).isnan()
    assert softcapped_cross_entropy(hidden, weight, targets, reduction="none").shape == (0,)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_deterministic(impl, device):
    hidden, weight, targets = inputs(((130,), 32, 96), device, torch.bfloat16)
    if reason := why_not(impl, hidden, weight, targets):
        pytest.skip(reason)
    one = torch.ones((), device=device)
    runs = [
        forward_and_grads(lambda h, w: softcapped_cross_entropy(h, w, targets, impl=impl), (hidden, weight), one)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_in_its_dtype_and_keeps_float32_gradients(device):
    hidden, weight, targets = inputs(((33,), 24, 40), device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast(device, torch.bfloat16):
        loss = softcapped_cross_entropy(*leaves, targets)
    assert torch.equal(loss, softcapped_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets))
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_as_one_graph(device, reduction):
    hidden, weight, targets = inputs(((33,), 24, 40), device, torch.bfloat16)

    def run(h, w):
        return softcapped_cross_entropy(h, w, targets, reduction=reduction)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    dloss = torch.ones(targets.shape if reduction == "none" else (), device=device)
    for a, b in zip(*(forward_and_grads(f, (hidden, weight), dloss) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPL_NAMES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [-1, 40, -(2**40)])
def test_wrong_target(impl, device, wrong):
    """An error on the CPU; on a GPU, where raising would need a sync, NaN in its loss and nothing else."""
    hidden, weight, targets = inputs(((6,), 16, 40), device, torch.bfloat16)
    if reason := why_not(impl, hidden, weight, targets):
        pytest.skip(reason)
    targets[2] = wrong
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 40\) or -100, got {wrong}"):
            softcapped_cross_entropy(hidden, weight, targets, impl=impl)
        return
    losses = softcapped_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
    assert losses[2].isnan() and losses.isnan().sum() == 1
    assert softcapped_cross_entropy(hidden, weight, targets, impl=impl).isnan()


def test_errors_say_what_and_why():
    hidden, weight, targets = torch.ones(3, 4), torch.ones(6, 4), torch.zeros(3, dtype=torch.int64)
    for args, message in (
        ((hidden, weight.T, targets), r"weight must be \[V, D=4\] with V > 0, got torch.float32 \[4, 6\]"),
        ((hidden, weight, targets[:2]), r"targets must have hidden's shape \[3\], got torch.int64 \[2\]"),
        ((hidden, weight, targets.int()), r"targets must be int64, got torch.int32 .*use targets.long\(\)"),
        ((hidden, weight.double(), targets), r"weight must be torch.float32 as hidden is, got torch.float64"),
        ((hidden, weight, targets, 0.0), r"softcap must be positive and finite, got 0.0"),
        ((hidden, weight, targets, 30.0, -100, "avg"), r"reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    ):
        with pytest.raises(ValueError, match="softcapped_cross_entropy: " + message):
            softcapped_cross_entropy(*args)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*(CUDA|bfloat16|not installed)"):
        softcapped_cross_entropy(hidden, weight, targets, impl="triton")


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("block", [8192, 128])  # a row in one block; a row in several, with a tail
def test_triton_in_chunks(device, reduction, block, monkeypatch, nan_filled_memory):
    """A chunk of 128 rows and a tail, which real sizes take beyond KEPT_LOGITS, and rows longer than a block."""
    from pgolf_kernels.ops.softcapped_cross_entropy import triton_kernel

    monkeypatch.setattr(tiles, "tile", lambda *_args, **_facts: triton_kernel.RowTile(block, 4))
    monkeypatch.setattr(op, "KEPT_LOGITS", 0)
    monkeypatch.setattr(op, "CHUNK_LOGITS", 1)
    tensors = inputs(((140,), 24, 301), device, torch.bfloat16)
    check("triton", tensors, reduction)
    with torch.no_grad():
        loss, kept = (
            softcapped_cross_entropy(*tensors, reduction=reduction, impl=impl) for impl in ("triton", "reference")
        )
    torch.testing.assert_close(loss, kept, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_wrong_targets_poison_their_own_row_only(device, nan_filled_memory):
    """The far ones would crash on the address they name, were it read."""
    from pgolf_kernels.ops.softcapped_cross_entropy import triton_kernel

    logits = torch.randn(6, 48, device=device).bfloat16()
    targets = torch.tensor([3, -1, -100, 48, 2**40, -(2**40)], device=device)
    losses, one = torch.empty(6, device=device), torch.ones((), device=device)
    before = logits[0].clone()
    triton_kernel.loss_and_grad(logits, targets, losses, one, 30.0, -100)
    assert losses.isnan().tolist() == [False, True, False, True, True, True] and losses[2] == 0
    assert logits.isnan().all(1).tolist() == [False, True, False, True, True, True] and not logits[2].any()
    assert logits[0].isfinite().all() and not torch.equal(logits[0], before)


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
def test_triton_registration(device):
    hidden, weight, targets = inputs(((9,), 24, 40), device, torch.bfloat16)
    args = (hidden.requires_grad_(), weight.requires_grad_(), targets, 30.0, -100)
    for reduction in REDUCTIONS:
        torch.library.opcheck(torch.ops.pgolf.softcapped_ce_kept.default, (*args, reduction))
    torch.library.opcheck(torch.ops.pgolf.softcapped_ce_chunked.default, (*args, "mean", True, True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("kept_logits", [0, 2**28])
def test_cuda_graph_replays_with_other_inputs(kept_logits, monkeypatch):
    monkeypatch.setattr(op, "KEPT_LOGITS", kept_logits)
    hidden, weight, targets = inputs(((256,), 64, 1024), "cuda", torch.bfloat16)

    def train():
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = softcapped_cross_entropy(*leaves, targets, impl="triton")
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    for t, other in zip((hidden, weight, targets), inputs(((256,), 64, 1024), "cuda", torch.bfloat16), strict=True):
        t.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, train(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2**31 logits need a CUDA GPU")
def test_more_than_2_to_the_31_logits():
    """reduction="none" keeps all logits in one tensor, whose last rows lie beyond int32 offsets."""
    hidden, weight, targets = inputs(((2**18 + 64,), 16, 8192), "cuda", torch.bfloat16)
    losses, dhidden, _ = forward_and_grads(
        lambda h, w: softcapped_cross_entropy(h, w, targets, reduction="none", impl="triton"),
        (hidden, weight),
        torch.ones(targets.shape, device="cuda"),
    )
    want, dwant, _ = forward_and_grads(
        lambda h, w: reference.forward(h, w, targets[-100:], 30.0, -100, "none"),
        (hidden[-100:], weight),
        torch.ones(100, device="cuda"),
    )
    torch.testing.assert_close(losses[-100:], want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dhidden[-100:], dwant, rtol=5e-2, atol=5e-2)


@needs_triton
@pytest.mark.parametrize("device", TRITON_DEVICES)
@pytest.mark.parametrize(
    ("reduction", "kept_logits", "op_name", "products"),
    [("mean", 2**28, "kept", 2), ("none", 0, "kept", 2), ("mean", 0, "chunked", 0)],
)
def test_triton_keeps_small_or_unreduced_logits(device, reduction, kept_logits, op_name, products, monkeypatch):
    """Kept: the compiler sees both products of the backward. Beyond KEPT_LOGITS: it sees one op."""
    monkeypatch.setattr(op, "KEPT_LOGITS", kept_logits)
    hidden, weight, targets = inputs(((5,), 16, 40), device, torch.bfloat16)
    dloss = torch.ones(targets.shape if reduction == "none" else (), device=device)
    with record_ops() as seen:
        forward_and_grads(
            lambda h, w: softcapped_cross_entropy(h, w, targets, reduction=reduction, impl="triton"),
            (hidden, weight),
            dloss,
        )
    assert [name for name in seen if name.startswith("pgolf::")] == [f"pgolf::softcapped_ce_{op_name}"]
    assert seen.count("aten::mm") == products
