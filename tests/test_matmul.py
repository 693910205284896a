"""matmul's two ways, whatever this machine multiplies fast, and the ops that go backward by it."""

import pytest
import torch

from pgolf_kernels import Int6Weight, int6_linear, matmul, softcapped_cross_entropy

FAST = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(params=FAST)
def fast(request, monkeypatch):
    monkeypatch.setattr(matmul, "default_compute_dtype", lambda device: FAST[request.param])
    return FAST[request.param]


def test_product(fast):
    a, b = torch.randn(37, 300).bfloat16(), torch.randn(300, 21).bfloat16()
    y = matmul.matmul(a, b)
    exact = a.double() @ b.double()
    assert y.dtype == fast
    assert (y.double() - exact).abs().max() <= 2 * (exact.to(fast).double() - exact).abs().max() + 1e-4
    assert matmul.matmul(a.float(), b.float()).dtype == torch.float32
    assert matmul.matmul(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_the_loss_keep_their_dtype(fast, reduction):
    hidden, weight = torch.randn(50, 33).bfloat16().requires_grad_(), torch.randn(70, 33).bfloat16().requires_grad_()
    targets = torch.randint(70, (50,))
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    found = torch.autograd.grad(
        softcapped_cross_entropy(hidden, weight, targets, reduction=reduction).sum(), (hidden, weight)
    )
    exact = torch.autograd.grad(
        softcapped_cross_entropy(*exact_inputs, targets, reduction=reduction).sum(), exact_inputs
    )
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == torch.bfloat16
        assert (f.double() - e).norm() <= 0.01 * e.norm()


def test_gradient_of_int6_keeps_its_dtype(fast):
    weight = Int6Weight.from_codes(torch.randint(-31, 32, (40, 66), dtype=torch.int8), torch.rand(40).half())
    x, dy = torch.randn(9, 66).bfloat16().requires_grad_(), torch.randn(9, 40).bfloat16()
    (dx,) = torch.autograd.grad(int6_linear(x, weight), x, dy)
    exact = dy.double() @ weight.dequantize(torch.float64)
    assert dx.dtype == torch.bfloat16 and (dx.double() - exact).norm() <= 0.01 * exact.norm()
