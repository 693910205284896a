"""Int6 weights: W[n, k] ~ scale[n] * q[n, k] with q in -31..31 and one float16 scale per output row; y = x W^T + bias.

    scale[n] = fp16(max(c[n] / 31, floor))        q = clamp(round_half_even(w / scale), -31, 31)

The clip value c[n] is a quantile of |w[n]| ("search", "max") or a multiple of the row's standard deviation. "search"
tries five quantiles and keeps, for the whole matrix, the first with the least squared error. The surprise: published
systems use floor = 1/31, so every row with c <= 1 gets the same step and the search changes nothing.
Gradient: dx = dy W. W is data, not a parameter.
Sources: `quantize_int6_per_row` of openai/parameter-golf #1217 (search); #1394 (standard deviations, "SDClip").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CODE_MAX = 31
QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
SMALLEST_SCALE = 2.0**-24  # least positive float16: a floor of 1e-10 would round to 0, and 0 / 0 has no code
BLOCK_ELEMENTS = 2**22  # rows are handled in blocks of this many weights, which bounds temporaries and stays in cache


def row_blocks(w: Tensor) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, w.size(1)))
    return [slice(start, start + step) for start in range(0, max(1, w.size(0)), step)]


def row_quantiles(w: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """torch.quantile(w.abs(), quantiles, dim=1) to the bit, but for rows of any length; [len(quantiles), N].

    Only the largest few values of a row are sorted, once for all quantiles. torch.quantile multiplies q by the last
    index in the dtype of w, which in float32 moves the interpolation enough to change a scale: so do we.
    """
    last = w.size(1) - 1
    rank = torch.tensor(quantiles, dtype=w.dtype).mul(last).clamp(max=last)
    below, above = rank.floor().long(), rank.ceil().long()
    below_from_top, above_from_top, weight = (t.to(w.device) for t in (last - below, last - above, rank.frac()))
    num_top = last - int(below.min()) + 1
    blocks = []
    for rows in row_blocks(w):
        top = w[rows].abs().topk(num_top, dim=1).values.T  # [num_top, rows], largest first
        blocks.append(torch.lerp(top[below_from_top], top[above_from_top], weight[:, None]))
    return torch.cat(blocks, dim=1)


def candidate_clips(w: Tensor, clip: str | float) -> Tensor:
    """The clip values to try, [candidates, N]."""
    if w.numel() == 0:
        return w.new_zeros(1, w.size(0))
    if clip == "search":
        return row_quantiles(w, QUANTILES)
    if clip == "max":
        return w.abs().amax(1)[None]
    return clip * w.std(1, correction=min(1, w.size(1) - 1))[None]  # one column alone has no spread


def candidate_scales(w: Tensor, clip: str | float, floor: float, code_max: int = CODE_MAX) -> Tensor:
    """The scales to try, float16 [candidates, N], all positive."""
    steps = candidate_clips(w, clip) / code_max
    return steps.clamp_min(max(floor, SMALLEST_SCALE)).to(torch.float16)


def round_to_codes(w: Tensor, scale: Tensor, code_max: int = CODE_MAX) -> Tensor:
    """Codes of w as whole numbers in w's dtype."""
    return (w / scale.to(w.dtype)[:, None]).round().clamp(-code_max, code_max)


def squared_error(w: Tensor, scale: Tensor, code_max: int = CODE_MAX) -> float:
    def block_error(w: Tensor, scale: Tensor) -> float:
        # Summed in float64: the order of a float32 sum depends on the thread count, and with it a near-tied choice.
        values = round_to_codes(w, scale, code_max) * scale.to(w.dtype)[:, None]
        return (w - values).square().sum(dtype=torch.float64).item()

    return sum(block_error(w[rows], scale[rows]) for rows in row_blocks(w))


def quantize(w: Tensor, clip: str | float, floor: float, code_max: int = CODE_MAX) -> tuple[Tensor, Tensor]:
    """w [N, K] in float32 or float64 -> codes int8 [N, K] in -code_max..code_max (31: six bits), scale float16 [N]."""
    steps = candidate_scales(w, clip, floor, code_max)
    scales = [s for i, s in enumerate(steps) if i == 0 or not s.equal(steps[i - 1])]  # under the floor all are one
    # Of equals the first.
    scale = scales[0] if len(scales) == 1 else min(scales, key=lambda s: squared_error(w, s, code_max))
    codes = [round_to_codes(w[rows], scale[rows], code_max).to(torch.int8) for rows in row_blocks(w)]
    return torch.cat(codes), scale


def pack(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] -> uint8 [N, 3 * ceil(K / 4)]; the layout is described in weight.py."""
    n, k = codes.shape
    c0, c1, c2, c3 = F.pad(codes + 32, (0, -k % 4), value=32).to(torch.uint8).view(n, (k + 3) // 4, 4).unbind(2)
    return torch.stack((c0 | c1 << 6, c1 >> 2 | c2 << 4, c2 >> 4 | c3 << 2), 2).flatten(1)


def unpack(packed: Tensor, num_columns: int) -> Tensor:
    """The inverse of pack: int8 [N, num_columns]."""
    b0, b1, b2 = packed.view(packed.size(0), packed.size(1) // 3, 3).unbind(2)
    codes = torch.stack((b0, b0 >> 6 | b1 << 2, b1 >> 4 | b2 << 4, b2 >> 2), 2) & 63
    return codes.flatten(1)[:, :num_columns].to(torch.int8) - 32


def dequantize(packed: Tensor, scale: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """W [N, num_columns]. A 6-bit code times an 11-bit scale is exact in float32, so dtype rounds once."""
    return (unpack(packed, num_columns).float() * scale.float()[:, None]).to(dtype)


def forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(packed, scale, x.size(-1), x.dtype), bias)
