"""The check before a Triton kernel's first launch where releases of Triton have miscompiled."""

import pytest
import torch

from pgolf_kernels import causal_attention, dispatch, leaky_relu2_mlp, newton_schulz, softcapped_cross_entropy
from pgolf_kernels.dispatch import self_check

CPU = torch.device("cpu")


@pytest.fixture
def suspect(monkeypatch):
    monkeypatch.setattr(dispatch, "_suspect", lambda device: True)
    monkeypatch.setattr(dispatch, "_checked", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_a_right_kernel_is_checked_once(suspect):
    calls = []

    def probe():
        calls.append(1)
        exact = torch.randn(64, 64, dtype=torch.float64)
        return exact.bfloat16(), exact

    for _ in range(3):
        self_check("an_op", CPU, probe)
    assert len(calls) == 1
    self_check("another_op", CPU, probe)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [lambda x: x.T, lambda x: torch.where(x > 2.5, 0, x), lambda x: x * torch.nan])
def test_a_wrong_kernel_raises_every_time(suspect, damage):
    pytest.importorskip("triton")
    exact = torch.randn(64, 64, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="an_op: Triton .* compiles this kernel wrongly on a GPU"):
            self_check("an_op", CPU, lambda: (damage(exact), exact))


@pytest.mark.parametrize(
    ("version", "capability", "suspected"),
    [("3.3.1", (9, 0), False), ("3.4.0", (9, 0), True), ("3.7.0+git1", (9, 0), True), ("3.8.0", (9, 0), False)]
    + [("3.6.0", (8, 0), False), ("3.6.0", (10, 0), False)],
)
def test_which_machines_are_suspect(monkeypatch, version, capability, suspected):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch._suspect(torch.device("cuda", 0)) is suspected
    assert not dispatch._suspect(CPU)


def test_an_op_is_not_checked_where_triton_is_trusted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_checked", set())
    self_check("an_op", CPU, lambda: pytest.fail("the probe ran"))


# The arguments of each op, on any device.
CALLS = {
    leaky_relu2_mlp: lambda: [torch.randn(3, 4), torch.randn(6, 4), torch.randn(4, 6)],
    softcapped_cross_entropy: lambda: [torch.randn(3, 4), torch.randn(6, 4), torch.zeros(3, dtype=torch.int64)],
    causal_attention: lambda: [torch.randn(1, 3, 2, 4) for _ in range(3)],
    newton_schulz: lambda: [torch.randn(2, 3, 4)],
}


@pytest.mark.parametrize("op", CALLS)
def test_tensors_on_several_devices_are_refused(op):
    arguments = CALLS[op]()
    for i in range(len(arguments) if len(arguments) > 1 else 0):
        moved = [t.to("meta") if i == j else t for j, t in enumerate(arguments)]
        with pytest.raises(ValueError, match=r"must be on one device, got .* on meta"):
            op(*moved)


@pytest.mark.parametrize("op", CALLS)
def test_meta_tensors_give_shapes(op):
    """As torch's own operators do; nothing is known there of autocast."""
    arguments = CALLS[op]()
    want, got = op(*arguments), op(*(t.to("meta") for t in arguments))
    assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")
