"""The modules: each is its op with the parameters held, survives dtype changes and state dicts, and trains."""

import pytest
import torch
import torch.nn.functional as F
from numerics import DEVICES

from pgolf_kernels import leaky_relu2_mlp, quantize_int6, softcapped_cross_entropy
from pgolf_kernels.nn import Int6Linear, LeakyReLU2MLP, SoftcappedHead


@pytest.mark.parametrize("device", DEVICES)
def test_mlp_is_the_op_and_trains(device):
    mlp = LeakyReLU2MLP(16, 48, negative_slope=0.3, device=device)
    x = torch.randn(2, 5, 16, device=device)
    torch.testing.assert_close(mlp(x), leaky_relu2_mlp(x, mlp.w_up, mlp.w_down, 0.3))
    torch.testing.assert_close(mlp(x), F.linear(F.leaky_relu(F.linear(x, mlp.w_up), 0.3).square(), mlp.w_down))
    mlp(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in mlp.parameters())
    assert repr(mlp) == "LeakyReLU2MLP(dim=16, hidden_dim=48, negative_slope=0.3)"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_int6_linear_from_a_linear(device, bias):
    linear = torch.nn.Linear(24, 10, bias=bias, device=device)
    layer = Int6Linear.from_linear(linear, floor=0)
    x = torch.randn(3, 24, device=device)
    weight = quantize_int6(linear.weight, floor=0).dequantize()
    torch.testing.assert_close(layer(x), F.linear(x, weight, linear.bias))
    assert (layer(x) - linear(x)).abs().max() < 0.1 * linear(x).abs().max()  # six bits are this close
    assert not list(layer.parameters())


def test_int6_scales_survive_dtype_changes_and_state_dicts():
    layer = Int6Linear.from_linear(torch.nn.Linear(24, 10), floor=0)
    scale = layer.weight.scale.clone()
    assert torch.equal(layer.bfloat16().weight.scale, scale)
    other = Int6Linear.from_linear(torch.nn.Linear(24, 10), floor=0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.scale, scale)
    assert torch.equal(other.weight.codes(), layer.weight.codes())
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_head_loss_and_logits_agree_and_tie(device):
    embedding = torch.nn.Embedding(32, 16, device=device)
    head = SoftcappedHead(16, 32, softcap=5.0, weight=embedding.weight)
    assert head.weight is embedding.weight
    hidden = 3 * torch.randn(2, 7, 16, device=device)
    targets = torch.randint(0, 32, (2, 7), device=device)
    loss = head(hidden, targets)
    assert head.logits(hidden).abs().max() <= 5.0
    torch.testing.assert_close(loss, F.cross_entropy(head.logits(hidden).flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(loss, softcapped_cross_entropy(hidden, head.weight, targets, 5.0))
    loss.backward()
    assert embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "make", [lambda: LeakyReLU2MLP(16, 32), lambda: Int6Linear.from_linear(torch.nn.Linear(16, 8))]
)
def test_compiles_to_one_graph(make):
    module, x = make(), torch.randn(3, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_errors_say_what_and_why():
    with pytest.raises(ValueError, match=r"linear must be a torch.nn.Linear"):
        Int6Linear.from_linear(torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"weight must be \[32, 16\], got \[16, 32\]"):
        SoftcappedHead(16, 32, weight=torch.nn.Parameter(torch.zeros(16, 32)))
