"""The machine code of every Triton kernel, for Ampere, Hopper and both Blackwells, compiled without a GPU.

Each launcher runs at real sizes with compilation in place of launches, so it is the launch's own specialisation that
must not spill, must fit shared memory, and must use the tensor cores' instructions that the architecture offers.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")
import triton_cpu
from triton_cpu import MachineCode

from pgolf_kernels.dispatch import TRITON_INTERPRETED

pytestmark = pytest.mark.skipif(TRITON_INTERPRETED, reason="interpreted kernels have no machine code")

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # per block, opt-in: A100, H100, B200, RTX 50
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ASYNC_COPY = {80: "LDGSTS", 90: "UTMALDG", 100: "UTMALDG", 120: "UTMALDG"}


def leaky_relu2_mlp(capability: int) -> None:
    from pgolf_kernels.ops.leaky_relu2_mlp import triton_kernel

    on = triton_kernel.Machine(divmod(capability, 10), 132, SHARED_BYTES[capability])
    triton_kernel.machine = lambda device: on
    M, D, H = 4096, 512, 1536
    x, w_up, w_down = (torch.empty(s, dtype=torch.bfloat16) for s in ((M, D), (H, D), (D, H)))
    triton_kernel.dp(x, w_down, triton_kernel.up(x, w_up, 0.5), 0.5)


def softcapped_cross_entropy(capability: int) -> None:
    from pgolf_kernels.ops.softcapped_cross_entropy import triton_kernel

    for V in (1024, 8192, 50304):
        logits = torch.empty(64, V, dtype=torch.bfloat16)
        targets, losses, one = torch.empty(64, dtype=torch.int64), torch.empty(64), torch.ones(())
        triton_kernel.loss_and_grad(logits, targets, losses, one, 30.0, -100)


def newton_schulz(capability: int) -> None:
    from pgolf_kernels.ops.newton_schulz import op, triton_kernel

    for bank in ((22, 512, 512), (11, 1536, 512), (3, 512, 1536)):  # large tiles both ways round, and small ones
        g = torch.empty(bank, dtype=torch.bfloat16)
        triton_kernel.forward(g, op.schedule("quintic", 5), True, 1e-7, g.dtype)


LAUNCHERS = (leaky_relu2_mlp, softcapped_cross_entropy, newton_schulz)


def compile_all(capability: int) -> dict[str, list[MachineCode]]:
    return {launch.__name__: triton_cpu.machine_code(launch, capability) for launch in LAUNCHERS}


@pytest.fixture(scope="module")
def compiled():
    """Capability -> op -> its kernels. Triton's driver is replaced for good there, hence a process per architecture."""
    with ProcessPoolExecutor(len(SHARED_BYTES), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        yield {capability: pool.submit(compile_all, capability) for capability in SHARED_BYTES}


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_leaky_relu2_mlp(compiled, capability):
    codes = compiled[capability].result()["leaky_relu2_mlp"]
    assert [code.kernel for code in codes] == ["leaky_relu2_up_kernel", "leaky_relu2_dp_kernel"]
    for code in codes:
        assert not code.spills, code
        assert code.shared_bytes <= SHARED_BYTES[capability], code
        assert code.instructions.get(TENSOR_CORE[capability]) and code.instructions.get(ASYNC_COPY[capability]), code


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_softcapped_cross_entropy(compiled, capability):
    codes = compiled[capability].result()["softcapped_cross_entropy"]
    assert [code.kernel for code in codes] == 3 * ["softcapped_ce_kernel"]
    for code in codes:
        assert not code.spills, code
        assert code.registers <= 128, code  # two blocks of 8 warps on each multiprocessor, to keep memory busy


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_newton_schulz(compiled, capability):
    codes = compiled[capability].result()["newton_schulz"]
    assert {"row_squares_kernel", "normalize_kernel", "symmetric_kernel", "apply_kernel"} == {c.kernel for c in codes}
    for code in codes:
        assert not code.spills, code
        assert code.shared_bytes <= SHARED_BYTES[capability], code
        if code.kernel in ("symmetric_kernel", "apply_kernel"):
            assert code.instructions.get(TENSOR_CORE[capability]) and code.instructions.get("LDGSTS"), code
