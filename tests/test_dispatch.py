"""The check before a Triton kernel's first launch where releases of Triton have miscompiled."""

import pytest
import torch

from pgolf_kernels import dispatch
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
