"""SLOT in Triton: AdamW fits and scores where the CUDA extension is missing. The maths is in reference.py.

The rows are gathered by PyTorch, the base logits are the same grouped products as cuda_kernel's, and a step is 2
launches for a bias, 4 with delta, 5 through the norm. Segments of 32 rows are the unit of every sum, so a window's bits
do not depend on its batch. With Fit.told nothing waits for the device (but for a copy of unequal counts to it).

The surprise is tanh(x) = 2 sigmoid(2 x) - 1: Triton has no portable tanh, and this one is off by 2^-24 at most, which
the softcap makes 2e-6 of a logit: nothing to a bfloat16 logit, too much to a float32 one, hence _tanh's second form.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Fit, Score, window_stride
from .reference import RMS_EPS
from .triton_rows import SEGMENT, Rows


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """2 sigmoid(2 x) - 1, and if EXACT near 0, where that cancels, a series good to float32's last bit."""
    y = 2 * tl.sigmoid(2 * x) - 1
    if EXACT:
        q = x * x
        series = 0.0035921280365 * q - 0.0088632355300
        series = ((series * q + 0.0218694885361) * q - 0.0539682539683) * q + 0.1333333333333
        y = tl.where(q < 0.16, x + x * q * (series * q - 0.3333333333333), y)
    return y


@triton.jit
def _inverse_rms(hidden, rows, inside, delta, D, eps, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(mean((h + delta)^2) + eps)^(-1/2) of `rows` [ROWS]."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        at = hidden + rows[:, None] * D + d[None, :]
        h = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        h += tl.load(delta + d, mask=d < D, other=0.0)[None, :]
        total += tl.sum(h * h, 1)
    return 1 / tl.sqrt(total / D + eps)


@triton.jit
def _logits(logits, stride, rows, inside, shift, bias, r, V, cap, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
            BEFORE: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """Of a tile [ROWS, BLOCK_V]: s before the bias; u; exp(l - largest), 0 beyond V; l's scale; largest [ROWS]."""
    v = tl.arange(0, BLOCK_V)
    mask = inside[:, None] & (v < V)[None, :]
    s = tl.load(logits + rows[:, None] * stride + v[None, :], mask=mask, other=0.0).to(tl.float32)
    s += tl.load(shift + v, mask=v < V, other=0.0)[None, :]
    z = s
    if BEFORE:
        s = r[:, None] * s
        z = s + tl.load(bias + v, mask=v < V, other=0.0)[None, :]
    u = _tanh(z / cap, logits.dtype.element_ty == tl.float32) if CAPPED else z
    scale = cap if CAPPED else 1.0
    largest = tl.zeros((ROWS,), tl.float32)
    if not PLAIN:
        largest = tl.max(tl.where((v < V)[None, :], u, -float("inf")), 1)
    e = tl.where((v < V)[None, :], tl.exp2((u - largest[:, None]) * (scale * 1.4426950408889634)), 0.0)
    return s, u, e, scale, largest


@triton.jit
def slot_sweep_kernel(hidden, logits, stride, target, weight, segment_window, first_segment, found, shift, shift_stride,
                      bias, bias_stride, delta, delta_stride, partial, bias_partial, slope, loss_partial, V, D, cap,
                      eps, SHARED: tl.constexpr, BEFORE: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr,
                      SEGMENT: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
                      BLOCK_D: tl.constexpr):  # fmt: skip
    """One segment: its loss, and the column sums of the gradient in the logits [V] (BEFORE: with and without r)."""
    segment = tl.program_id(0).to(tl.int64)
    window = tl.load(segment_window + segment)
    group = window * 0 if SHARED else window
    shift += group * shift_stride
    bias += group * bias_stride
    delta += group * delta_stride
    count = tl.load(found + window) - (segment - tl.load(first_segment + window)) * SEGMENT
    v = tl.arange(0, BLOCK_V)
    acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    bias_acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    loss = tl.zeros((ROWS,), tl.float64)
    for start in range(0, SEGMENT, ROWS):
        i = start + tl.arange(0, ROWS)
        inside = i < count
        rows = segment * SEGMENT + i
        m = tl.load(weight + rows, mask=inside, other=0.0)
        y = tl.load(target + rows, mask=inside, other=0)
        r = tl.zeros((ROWS,), tl.float32)
        if BEFORE:
            r = _inverse_rms(hidden, rows, inside, delta, D, eps, ROWS, BLOCK_D)
        s, u, e, scale, largest = _logits(
            logits, stride, rows, inside, shift, bias, r, V, cap, ROWS, BLOCK_V, BEFORE, CAPPED, PLAIN
        )
        total = tl.sum(e, 1)
        is_target = v[None, :] == y[:, None]
        u_y = tl.sum(tl.where(is_target, u, 0.0), 1)
        loss += tl.where(inside, m * (tl.log(total) + scale * (largest - u_y)), 0.0).to(tl.float64)
        g = m[:, None] * (e / total[:, None] - tl.where(is_target, 1.0, 0.0))
        if CAPPED:
            g = g * (1 - u * u)
        g = tl.where(inside[:, None], g, 0.0)
        if BEFORE:
            acc += r[:, None] * g
            bias_acc += g
            tl.store(slope + rows, r * r / D * tl.sum(tl.where((v < V)[None, :], g * s, 0.0), 1))
        else:
            acc += g
    out = segment * V + v
    tl.store(partial + out, tl.sum(acc, 0), mask=v < V)
    if BEFORE:
        tl.store(bias_partial + out, tl.sum(bias_acc, 0), mask=v < V)
    tl.store(loss_partial + segment, tl.sum(loss, 0))


@triton.jit
def slot_project_kernel(weight, delta, delta_stride, bias, bias_stride, out, V, D, BIAS: tl.constexpr,
                        BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """out [G, V] = weight delta + bias."""
    group = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        w = tl.load(weight + v[:, None] * D + d[None, :], mask=(v < V)[:, None] & (d < D)[None, :], other=0.0)
        x = tl.load(delta + group * delta_stride + d, mask=d < D, other=0.0)
        total += tl.sum(w.to(tl.float32) * x[None, :], 1)
    if BIAS:
        total += tl.load(bias + group * bias_stride + v, mask=v < V, other=0.0)
    tl.store(out + group * V + v, total, mask=v < V)


@triton.jit
def _adamw(x, moments, size, at, mask, g, beta1, beta2, rest1, rest2, keep, step, correction, eps):
    """One step of the parameters at `at`; moments: size first ones, then size second ones."""
    m = beta1 * tl.load(moments + at, mask=mask) + rest1 * g
    v = beta2 * tl.load(moments + size + at, mask=mask) + rest2 * g * g
    tl.store(moments + at, m, mask=mask)
    tl.store(moments + size + at, v, mask=mask)
    tl.store(x + at, tl.load(x + at, mask=mask) * keep - step * m / (tl.sqrt(v * correction) + eps), mask=mask)


@triton.jit
def slot_reduce_kernel(partial, bias_partial, loss_partial, group_first, group_last, alive, sums, losses, x, moments,
                       size, parameter_stride, bias_at, beta1, beta2, rest1, rest2, keep, step, correction, eps, V,
                       SUMS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Add up a group's segments, in their order: the loss, the sums for delta, and the bias's step."""
    group = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(group_first + group), tl.load(group_last + group)  # int64, and so is s
    total = tl.zeros((BLOCK,), tl.float32)
    bias_total = tl.zeros((BLOCK,), tl.float32)
    for s in range(first, last):
        if SUMS:
            total += tl.load(partial + s * V + v, mask=v < V, other=0.0)
        if BIAS:
            bias_total += tl.load(bias_partial + s * V + v, mask=v < V, other=0.0)
    if SUMS:
        tl.store(sums + group * V + v, total, mask=v < V)
    if BIAS:
        mask = v < tl.where(tl.load(alive + group) != 0, V, 0)
        at = group * parameter_stride + bias_at + v
        _adamw(x, moments, size, at, mask, bias_total, beta1, beta2, rest1, rest2, keep, step, correction, eps)
    if tl.program_id(1) == 0:
        loss = tl.zeros((), tl.float64)
        for s in range(first, last):
            loss += tl.load(loss_partial + s)
        tl.store(losses + group, loss.to(tl.float32))


@triton.jit
def slot_add_rows_kernel(hidden, slope, segment_window, first_segment, found, delta, delta_stride, out, D,
                         SHARED: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """out [S, D] = sum over a segment's rows of slope (h + delta): what delta does through the norm."""
    segment = tl.program_id(0).to(tl.int64)
    window = tl.load(segment_window + segment)
    group = window * 0 if SHARED else window
    i = tl.arange(0, SEGMENT)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = i < tl.load(found + window) - (segment - tl.load(first_segment + window)) * SEGMENT
    rows = segment * SEGMENT + i
    mask = inside[:, None] & (d < D)[None, :]
    h = tl.load(hidden + rows[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    h += tl.load(delta + group * delta_stride + d, mask=d < D, other=0.0)[None, :]
    q = tl.load(slope + rows, mask=inside, other=0.0)
    tl.store(out + segment * D + d, tl.sum(tl.where(mask, q[:, None] * h, 0.0), 0), mask=d < D)


@triton.jit
def slot_descend_kernel(weight, sums, row_partial, group_first, group_last, alive, x, moments, size, parameter_stride,
                        beta1, beta2, rest1, rest2, keep, step, correction, eps, V, D, BEFORE: tl.constexpr,
                        BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """delta's step: its gradient is sums weight, less what it does through the norm."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V).to(tl.int64)
        w = tl.load(weight + v[:, None] * D + d[None, :], mask=(v < V)[:, None] & (d < D)[None, :], other=0.0)
        acc += w.to(tl.float32) * tl.load(sums + group * V + v, mask=v < V, other=0.0)[:, None]
    g = tl.sum(acc, 0)
    if BEFORE:
        for s in range(tl.load(group_first + group), tl.load(group_last + group)):
            g -= tl.load(row_partial + s * D + d, mask=d < D, other=0.0)
    mask = d < tl.where(tl.load(alive + group) != 0, D, 0)
    at = group * parameter_stride + d
    _adamw(x, moments, size, at, mask, g, beta1, beta2, rest1, rest2, keep, step, correction, eps)


@triton.jit
def slot_score_kernel(hidden, logits, stride, target, segment_window, first_segment, found, shift, shift_stride, bias,
                      bias_stride, delta, delta_stride, first_output, nll, V, D, cap, eps, BEFORE: tl.constexpr,
                      CAPPED: tl.constexpr, PLAIN: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
                      BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """nll of ROWS rows of a segment. The bias always joins where BEFORE has it, which after the norm is the same."""
    segment = tl.program_id(0).to(tl.int64)
    window = tl.load(segment_window + segment)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    skipped = (segment - tl.load(first_segment + window)) * SEGMENT
    begin, end = tl.load(first_output + window), tl.load(first_output + window + 1)
    at = begin + skipped + i
    inside = (skipped + i < tl.load(found + window)) & (at < end)
    rows = segment * SEGMENT + i
    r = tl.full((ROWS,), 1.0, tl.float32)
    if BEFORE:
        r = _inverse_rms(hidden, rows, inside, delta + window * delta_stride, D, eps, ROWS, BLOCK_D)
    _, u, e, scale, largest = _logits(
        logits, stride, rows, inside, shift + window * shift_stride, bias + window * bias_stride, r, V, cap, ROWS,
        BLOCK_V, True, CAPPED, PLAIN,
    )  # fmt: skip
    y = tl.load(target + rows, mask=inside, other=0)
    u_y = tl.sum(tl.where(tl.arange(0, BLOCK_V)[None, :] == y[:, None], u, 0.0), 1)
    tl.store(nll + at, tl.log(tl.sum(e, 1)) + scale * (largest - u_y), mask=inside)


def fit(p: Fit) -> tuple[Tensor, Tensor]:
    """Return the parameters [G, P] and the losses [steps, G], as reference.fit does."""
    x, gathered = p.start, Rows(p)
    (G, P), (V, D), S, before = x.shape, p.weight.shape, gathered.S, p.norm == "before"
    delta, bias = p.parameters != "bias", p.parameters != "delta"
    losses, first = x.new_zeros(p.steps, G), gathered.first_segment
    if p.shared:
        group_first, group_last = first[:1], first[-1:]
        alive, impossible = (gathered.found > 0).any(0, keepdim=True), gathered.impossible.any(0, keepdim=True)
    else:
        group_first, group_last = first[:-1], first[1:]
        alive, impossible = gathered.found > 0, gathered.impossible
    alive = alive.int()
    if S:
        empty, none, options = x.new_empty, x.new_zeros(max(V, D)), gathered.options()  # none: a parameter that is not
        bias_at, bias_stride = (x[:, P - V :], P) if bias else (none, 0)
        delta_at, delta_stride = (x, P) if delta else (none, 0)
        shift, shift_stride = (empty(G, V), V) if delta else (none, 0) if before else (bias_at, bias_stride)
        moments, sums, partial = torch.zeros_like(x.expand(2, G, P)), empty(G, V) if delta else none, empty(S, V)
        bias_partial = empty(S, V) if before else partial
        slope, row_partial = (empty(S * SEGMENT), empty(S, D)) if before else (none, none)
        loss_partial = empty(S, dtype=torch.float64)
        layout = gathered.segment_window, first, gathered.found
        inputs = gathered.hidden, gathered.logits, gathered.logits.stride(0), gathered.target, gathered.row_weight
        (beta1, beta2), o, t = p.optimizer.betas, p.optimizer, gathered.tiles
        power1 = power2 = 1.0
        with torch.cuda.device_of(x):
            for k, lr in enumerate(o.learning_rates(p.steps)):
                power1, power2 = power1 * beta1, power2 * beta2
                step = (beta1, beta2, 1 - beta1, 1 - beta2, 1 - lr * o.weight_decay)
                step += (lr / (1 - power1), 1 / (1 - power2), o.eps)
                if delta:
                    slot_project_kernel[triton.cdiv(V, t.project.block_v), G](
                        gathered.weight, x, P, bias_at, bias_stride, shift, V, D, BIAS=bias and not before,
                        BLOCK_V=t.project.block_v, BLOCK_D=t.project.block_d, num_warps=t.project.num_warps,
                    )  # fmt: skip
                slot_sweep_kernel[S,](
                    *inputs, *layout, shift, shift_stride, bias_at, bias_stride, delta_at, delta_stride, partial,
                    bias_partial, slope, loss_partial, V, D, p.softcap or 1.0, RMS_EPS, SHARED=p.shared, **options,
                )  # fmt: skip
                slot_reduce_kernel[G, triton.cdiv(V, t.reduce.block_v)](
                    partial, bias_partial, loss_partial, group_first, group_last, alive, sums, losses[k], x, moments,
                    G * P, P, P - V, *step, V, SUMS=delta, BIAS=bias, BLOCK=t.reduce.block_v,
                    num_warps=t.reduce.num_warps,
                )  # fmt: skip
                if delta and before:
                    slot_add_rows_kernel[S, triton.cdiv(D, t.add_rows.block_d)](
                        gathered.hidden, slope, *layout, x, P, row_partial, D, SHARED=p.shared, SEGMENT=SEGMENT,
                        BLOCK_D=t.add_rows.block_d, num_warps=t.add_rows.num_warps,
                    )  # fmt: skip
                if delta:
                    slot_descend_kernel[G, triton.cdiv(D, t.descend.block_d)](
                        gathered.weight, sums, row_partial, group_first, group_last, alive, x, moments, G * P, P, *step,
                        V, D, BEFORE=before, BLOCK_V=t.descend.block_v, BLOCK_D=t.descend.block_d,
                        num_warps=t.descend.num_warps,
                    )  # fmt: skip
    return x.masked_fill_(impossible[:, None], torch.nan), losses.masked_fill_(impossible, torch.nan)


def score(p: Score) -> Tensor:
    """Return the negative log-likelihoods, as reference.score does."""
    gathered, (V, D) = Rows(p), p.weight.shape
    nll = torch.full((sum(gathered.room),), torch.nan, device=p.hidden.device)
    none = torch.zeros(max(V, D), device=p.hidden.device)
    delta, bias = (none if v is None else v.contiguous() for v in (p.delta, p.bias))
    shift, shift_stride = none, 0
    options = gathered.options()
    if gathered.S:
        with torch.cuda.device_of(nll):
            if p.delta is not None:
                shift, shift_stride = delta.new_empty(len(delta), V), V if len(delta) > 1 else 0
                t = gathered.tiles.project
                slot_project_kernel[triton.cdiv(V, t.block_v), len(delta)](
                    gathered.weight, delta, D, none, 0, shift, V, D, BIAS=False, BLOCK_V=t.block_v, BLOCK_D=t.block_d,
                    num_warps=t.num_warps,
                )  # fmt: skip
            slot_score_kernel[gathered.S, triton.cdiv(SEGMENT, options["ROWS"])](
                gathered.hidden, gathered.logits, gathered.logits.stride(0), gathered.target, gathered.segment_window,
                gathered.first_segment, gathered.found.where(~gathered.impossible, 0), shift, shift_stride, bias,
                window_stride(p.bias), delta, window_stride(p.delta), gathered.first_output, nll, V, D,
                p.softcap or 1.0, RMS_EPS, **options,
            )  # fmt: skip
    return nll
