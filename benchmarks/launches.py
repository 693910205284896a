"""One launch, at real sizes, of every Triton kernel in every form that matters: what benchmarks.machine_code compiles.

Each function stands for an op and calls its launchers as the op would, so that a kernel is specialised as it is in use.
The sizes take every row of a shipped table of tiles; the compilation fails where one is left out.
"""

import torch


def leaky_relu2_mlp() -> None:
    from pgolf_kernels.ops.leaky_relu2_mlp import triton_kernel

    M, D, H = 4096, 512, 1536
    x, w_up, w_down = (torch.empty(s, dtype=torch.bfloat16) for s in ((M, D), (H, D), (D, H)))
    triton_kernel.dp(x, w_down, triton_kernel.up(x, w_up, 0.5), 0.5)


def softcapped_cross_entropy() -> None:
    from pgolf_kernels.ops.softcapped_cross_entropy import triton_kernel

    for V in (1024, 2048, 4096, 8192, 50304):
        logits = torch.empty(64, V, dtype=torch.bfloat16)
        targets, losses, one = torch.empty(64, dtype=torch.int64), torch.empty(64), torch.ones(())
        triton_kernel.loss_and_grad(logits, targets, losses, one, 30.0, -100)


def newton_schulz() -> None:
    from pgolf_kernels.ops.newton_schulz import op, triton_kernel

    # Small tiles and large ones of either product, and both orientations of the Gram form.
    for bank in ((22, 512, 512), (11, 1536, 512), (3, 256, 512), (3, 1024, 1024)):
        g = torch.empty(bank, dtype=torch.bfloat16)
        triton_kernel.forward(g, op.schedule("quintic", 5), True, 1e-7, g.dtype)


def int6_linear() -> None:
    from pgolf_kernels.ops.int6_linear import gpu, triton_kernel

    gpu.borders(torch.device("cpu"))  # the table's choice among the kernels
    # Each number of rows that has its own tile; whole steps, wide tiles of the weight, half steps, odd depths.
    for M, N, K in (
        (16, 1536, 512),
        (16, 8192, 512),
        (16, 512, 500),
        (32, 1536, 512),
        (32, 8192, 512),
        (32, 512, 500),
        (64, 1536, 512),
        (64, 8192, 512),
        (64, 512, 640),
        (64, 7, 5),
    ):
        x, scale = torch.empty(M, K, dtype=torch.bfloat16), torch.empty(N, dtype=torch.float16)
        packed = torch.empty(N, 3 * ((K + 3) // 4), dtype=torch.uint8)
        triton_kernel.forward(x, packed, scale, None)
        if M == 16:
            triton_kernel.dequantize(packed, scale, K, x.dtype)


def slot() -> None:
    from pgolf_kernels.ops.slot import AdamW, triton_kernel
    from pgolf_kernels.ops.slot.problem import Fit, Score

    B, T, D = 2, 64, 512
    targets = torch.zeros(B, T, dtype=torch.int64)
    for V, norm, dtype in ((1024, "after", torch.bfloat16), (4096, "before", torch.bfloat16), (8192, "after", None)):
        hidden, weight = (torch.zeros(s, dtype=dtype or torch.float32) for s in ((B, T, D), (V, D)))
        model, softcap = (hidden, weight, targets), 30.0 if dtype else None
        options = {"told": [T] * B, "softcap": softcap, "norm": norm}
        fit = {"initial": None, "shared": False, "normalize": "window", "parameters": "both", "steps": 1}
        triton_kernel.fit(Fit(*model, torch.ones(B, T), **options, **fit, optimizer=AdamW()))
        delta, bias = torch.zeros(B, D), torch.zeros(B, V)
        triton_kernel.score(Score(*model, targets == 0, **options, delta=delta, bias=bias))


def newton_schulz_megakernel() -> None:
    from pgolf_kernels.ops.newton_schulz import megakernel, op

    for shapes, dtype in (
        (((22, 512, 512), (11, 1536, 512)), torch.bfloat16),  # the large tiles
        (((3, 512, 512), (2, 512, 1536)), torch.float32),  # the small ones
        (((2, 65, 130),), torch.bfloat16),  # rows that are no multiple of 16 bytes
    ):
        banks = [torch.empty(shape, dtype=dtype) for shape in shapes]
        megakernel.forward(banks, op.schedule("quintic", 5), True, 1e-7, torch.bfloat16)


def optimisers() -> None:
    from pgolf_kernels.optim import adamw_pass, muon_passes
    from pgolf_kernels.optim.averages import Averages

    for dtype, lr in ((torch.float32, 0.1), (torch.bfloat16, torch.ones(()))):  # the latter as in a CUDA graph
        params = [[torch.empty(22, 512, 512, dtype=dtype)], [torch.empty(512, 512, dtype=dtype)]]
        buffers = [[torch.empty(p.shape) for p in bank] for bank in params]
        banks = muon_passes.momentum_banks(params, buffers, lr, True, torch.bfloat16)
        all_params = [p for bank in params for p in bank]
        averages = Averages("optimisers", all_params, {p: torch.empty(p.shape) for p in all_params}, 0.99)
        muon_passes.update_banks(params, banks, [1.0, 2.0], lr, lr, averages)
        moments = [[torch.empty_like(p) for p in all_params] for _ in range(3)]
        counts, following = [torch.ones(()) for _ in all_params], [averages.of[p] for p in all_params]
        adamw_pass.adamw_pass(all_params, *moments, counts, following, lr, (0.9, 0.95), 1e-8, 0.1, 0.99)


LAUNCHERS = (
    leaky_relu2_mlp,
    softcapped_cross_entropy,
    newton_schulz,
    newton_schulz_megakernel,
    int6_linear,
    slot,
    optimisers,
)
