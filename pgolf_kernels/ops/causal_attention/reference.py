"""Causal attention with grouped key/value heads, and exclusive self-attention (XSA) as an epilogue.

    y[t, h] = sum_{s <= t} softmax_s(q[t, h] . k[s, kv(h)] / sqrt(d)) v[s, kv(h)],      kv(h) = h // (H / Hkv)
XSA removes the component along the position's own value, so a head passes on only what others hold:
    y[t, h] <- y[t, h] - (y[t, h] . v^) v^,      v^ = v[t, kv(h)] / max(|v[t, kv(h)]|, 1e-12)
Heads that share a key/value head are one reshape, (B, T, Hkv, H / Hkv, d): nothing is repeated.
Sources: arXiv:2305.13245 (GQA), arXiv:2603.09078 (XSA).
"""

import torch.nn.functional as F
from torch import Tensor


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """y (B, T, H, d) without its component along v (B, T, Hkv, d)."""
    B, T, Hkv, d = v.shape
    y_grouped = y.reshape(B, T, Hkv, y.shape[2] // Hkv, d)
    v_unit = F.normalize(v, dim=-1, eps=1e-12).unsqueeze(3)  # (B, T, Hkv, 1, d)
    return (y_grouped - (y_grouped * v_unit).sum(-1, keepdim=True) * v_unit).reshape(y.shape)


def forward(q: Tensor, k: Tensor, v: Tensor, exclude_self: bool) -> Tensor:
    """q (B, T, H, d), k and v (B, T, Hkv, d) -> (B, T, H, d)."""
    q_bhtd, k_bhtd, v_bhtd = (t.transpose(1, 2) for t in (q, k, v))
    y_bhtd = F.scaled_dot_product_attention(q_bhtd, k_bhtd, v_bhtd, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
    y = y_bhtd.transpose(1, 2)
    return exclude_own_value(y, v) if exclude_self else y
