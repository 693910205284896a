"""AdamW's update of many tensors in one launch, the moving average of the weights included.

Memory is all it costs: in float32 28 bytes a parameter, 36 with an average; torch's fused step and a separate average
are 28 and 12, in a launch and in several.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..multi_tensor import TL_DTYPES, PassTile, address_table, aligned, follow, locate, number, pieces, pointer


@triton.jit
def adamw_kernel(
    addresses_ptr,
    lr,
    weight_decay,
    one_minus_beta1,
    one_minus_beta2,
    log2_beta1,
    log2_beta2,
    eps,
    one_minus_decay,
    pieces_ptr,
    count,
    ON_DEVICE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    A_DTYPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """addresses: of p, g, m and v (P_DTYPE), of the step counts (float32), and of the averages (A_DTYPE) if AVERAGE."""
    tensor, _, at, exists = locate(pieces_ptr, count, PADDED, SIZE, ALIGNED)
    p_ptr = pointer(addresses_ptr, tensor, P_DTYPE, ALIGNED)
    g_ptr = pointer(addresses_ptr, count + tensor, P_DTYPE, ALIGNED)
    m_ptr = pointer(addresses_ptr, 2 * count + tensor, P_DTYPE, ALIGNED)
    v_ptr = pointer(addresses_ptr, 3 * count + tensor, P_DTYPE, ALIGNED)
    t = tl.load(pointer(addresses_ptr, 4 * count + tensor, tl.float32, False))
    lr = number(lr, ON_DEVICE)
    p = tl.load(p_ptr + at, mask=exists).to(tl.float32)
    g = tl.load(g_ptr + at, mask=exists).to(tl.float32)
    m = tl.load(m_ptr + at, mask=exists).to(tl.float32)
    v = tl.load(v_ptr + at, mask=exists).to(tl.float32)
    m += one_minus_beta1 * (g - m)
    v += one_minus_beta2 * (g * g - v)
    # 1 - beta^t, in float64 because it starts at a thousandth.
    correction1 = (1.0 - tl.exp2(t.to(tl.float64) * log2_beta1)).to(tl.float32)
    correction2 = tl.sqrt((1.0 - tl.exp2(t.to(tl.float64) * log2_beta2)).to(tl.float32))
    p = (1 - lr * weight_decay) * p - lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(p_ptr + at, p.to(P_DTYPE), mask=exists)
    tl.store(m_ptr + at, m.to(P_DTYPE), mask=exists)
    tl.store(v_ptr + at, v.to(P_DTYPE), mask=exists)
    if AVERAGE:
        a_ptr = pointer(addresses_ptr, 5 * count + tensor, A_DTYPE, ALIGNED)
        follow(a_ptr + at, p.to(P_DTYPE), one_minus_decay, exists)


def adamw_pass(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay: float,
) -> None:
    """One launch. params, grads, exp_avgs, exp_avg_sqs: one dtype, contiguous; steps: float32 counts, with this one.

    averages: none, or one for each parameter, of one dtype; lr: a number, or a float32 tensor on the device.
    """
    addresses = [t.data_ptr() for t in (*params, *grads, *exp_avgs, *exp_avg_sqs, *steps, *averages)]
    vectors = [t.data_ptr() for t in (*params, *grads, *exp_avgs, *exp_avg_sqs, *averages)]
    numels = tuple(p.numel() for p in params)
    device = params[0].device
    tile = tiles.tile(tiles.gpu(device), "optim", "adamw", PassTile)
    sizes = pieces(numels, (0,) * len(numels), tile.size, device)
    with torch.cuda.device_of(params[0]):
        adamw_kernel[(sizes.total,)](
            address_table(addresses, device),
            lr,
            weight_decay,
            1 - betas[0],
            1 - betas[1],
            math.log2(betas[0]) if betas[0] else -math.inf,
            math.log2(betas[1]) if betas[1] else -math.inf,
            eps,
            1 - decay,
            **sizes.arguments(),
            ON_DEVICE=isinstance(lr, Tensor),
            P_DTYPE=TL_DTYPES[params[0].dtype],
            A_DTYPE=TL_DTYPES[(averages or params)[0].dtype],
            AVERAGE=bool(averages),
            ALIGNED=sizes.aligned and aligned(vectors),
            num_warps=tile.num_warps,
        )
