"""The C++ cross-entropy at every instruction-set level this CPU has: accuracy, memory safety, threads.

T = 37 is a tail after two blocks of rows for every level, D = 33 and V = 75 are odd for every vector and for pairs;
V = 20,000 leaves room for one block of logits at a time.
"""

import math

import pytest
import torch
from memory import Guarded, in_child
from numerics import LEVELS, assert_as_accurate

from pgolf_kernels import extension, softcapped_cross_entropy
from pgolf_kernels.ops.softcapped_cross_entropy import cpu, reference

pytestmark = pytest.mark.skipif(extension.cpu is None, reason=str(extension.WHY_NOT_CPU))
SHAPES = [(1, 1, 1), (37, 33, 75), (40, 16, 20_000)]  # T, D, V
SOFTCAP, IGNORE, ROW_WEIGHT = 30.0, -100, 0.25


def make(shape, dtype):
    T, D, V = shape
    hidden, weight = torch.randn(T, D), 8 * torch.randn(V, D) / D**0.5
    targets = torch.randint(V, (T,))
    targets[1::5] = IGNORE
    return hidden.to(dtype), weight.to(dtype), targets


def ours(hidden, weight, targets, isa=""):
    """losses [T] and dlogits [T, V], in memory that was NaN before."""
    losses = torch.full((len(targets),), torch.nan)
    dlogits = torch.full((len(targets), len(weight)), torch.nan, dtype=hidden.dtype)
    cpu.loss_and_grad(hidden, weight, targets, losses, dlogits, SOFTCAP, IGNORE, ROW_WEIGHT, isa)
    return losses, dlogits


def by_autograd(hidden, weight, targets):
    """The reference's losses, and the gradient of the product, from a hidden state that is the product itself."""
    product = (hidden @ weight.T).requires_grad_()
    losses = reference.forward(product, torch.eye(len(weight), dtype=hidden.dtype), targets, SOFTCAP, IGNORE, "none")
    return losses.detach(), torch.autograd.grad(losses.sum() * ROW_WEIGHT, product)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_loss_and_gradient(isa, shape, dtype):
    inputs = make(shape, dtype)
    exact = by_autograd(*(t.double() if t.is_floating_point() else t for t in inputs))
    # Losses are differences of terms up to the width of the logits' range; gradients at most the row's weight.
    for found, baseline, truth, scale in zip(ours(*inputs, isa), by_autograd(*inputs), exact, (60, 0.25), strict=True):
        assert_as_accurate(found, baseline, truth, scale=scale)


@pytest.mark.parametrize("isa", LEVELS)
def test_a_large_vocabulary(isa):
    hidden, weight, targets = make(SHAPES[2], torch.bfloat16)
    losses, dlogits = ours(hidden, weight, targets, isa)
    z = SOFTCAP * torch.tanh(hidden.double() @ weight.double().T / SOFTCAP)
    want = (z.logsumexp(1) - z.gather(1, targets.clamp(min=0)[:, None])[:, 0]) * (targets != IGNORE)
    assert (losses - want).abs().max() < 1e-4  # float32 sums of 20,000 terms; logits of bfloat16 factors are exact
    totals = dlogits.double().sum(1) / ROW_WEIGHT  # softmax - onehot sums to 0, less what saturates
    assert torch.isfinite(dlogits).all() and totals.abs().max() < 1


def test_loss_alone_needs_no_gradient():
    inputs = make(SHAPES[1], torch.bfloat16)
    losses = torch.full((len(inputs[2]),), torch.nan)
    cpu.loss_and_grad(*inputs, losses, None, SOFTCAP, IGNORE, ROW_WEIGHT)
    assert torch.equal(losses, ours(*inputs)[0])


def test_unknown_targets_and_nan_show():
    hidden, weight, targets = make(SHAPES[1], torch.float32)
    targets[0], targets[1], targets[2] = 75, IGNORE, -1
    hidden[3, 5] = torch.nan
    losses, dlogits = ours(hidden, weight, targets)
    bad = torch.tensor([True, False, True, True] + [False] * (len(targets) - 4))
    assert torch.equal(losses.isnan(), bad) and torch.equal(dlogits.isnan().all(1), bad)
    assert losses[1] == 0 and not dlogits[1].any()


def test_threads_and_neighbours_change_nothing():
    inputs = make((300, 33, 75), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ours(*inputs))
    finally:
        torch.set_num_threads(before)
    alone = ours(inputs[0][100:101], inputs[1], inputs[2][100:101])
    for one, two, row in zip(*results, alone, strict=True):
        assert torch.equal(one, two) and torch.equal(one[100:101], row)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_touches_nothing_beyond_its_arguments(isa, dtype, at_end):
    hidden, weight, targets = make(SHAPES[1], dtype)
    losses, dlogits = torch.zeros(len(targets)), torch.zeros(len(targets), len(weight), dtype=dtype)

    def run():
        memory = [Guarded(t, at_end) for t in (hidden, weight, targets, losses, dlogits)]
        h, w, y, loss, grad = (g.address for g in memory)
        extension.cpu.softcapped_cross_entropy(
            hidden=h, weight=w, targets=y, sizes=SHAPES[1], bf16=dtype == torch.bfloat16, softcap=SOFTCAP,
            ignore_index=IGNORE, row_weight=1.0, losses=loss, dlogits=grad, pitch=SHAPES[1][2], threads=1, isa=isa,
        )  # fmt: skip

    assert in_child(run) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_positions(reduction):
    hidden, weight, _ = make((1, 4, 6), torch.float32)
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    loss = softcapped_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64), reduction=reduction, impl="cpu")
    want = reference.forward(hidden, weight, torch.empty(0, dtype=torch.int64), SOFTCAP, IGNORE, reduction)
    assert loss.shape == want.shape
    assert reduction == "none" or math.isnan(loss.item()) == math.isnan(want.item())


def test_registered_for_autograd_and_compile():
    hidden, weight, targets = make((9, 16, 40), torch.float32)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    for needs_grad in (True, False):
        arguments = (hidden, weight, targets, SOFTCAP, IGNORE, "mean", needs_grad)
        tests = ("test_schema", "test_faketensor") + (
            "test_autograd_registration",
            "test_aot_dispatch_dynamic",
        ) * needs_grad
        torch.library.opcheck(torch.ops.pgolf.softcapped_ce_kept_cpu.default, arguments, test_utils=tests)
    compiled = torch.compile(softcapped_cross_entropy, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, lambda h, w, y: softcapped_cross_entropy(h, w, y, impl="cpu")):
        loss = run(hidden, weight, targets)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_it_refuses():
    hidden, weight, targets = make((3, 4, 5), torch.float32)
    with pytest.raises(ValueError, match="impl='cpu' cannot run here: .* softcap <= 40.0, got 50"):
        softcapped_cross_entropy(hidden, weight, targets, 50.0, impl="cpu")
    with pytest.raises(ValueError, match=r"computes in float32 or bfloat16 on the CPU, got torch.float64"):
        softcapped_cross_entropy(hidden.double(), weight.double(), targets, impl="cpu")
