"""What decoding keeps of the positions before: keys and values per executed layer, and one position of two streams.

    cache = KVCache(model, batch=8, max_tokens=2048)
    logits = model.logits(prompt, cache)       # any number of positions first,
    logits = model.logits(token, cache)        # then one at a time

The surprise is the rotary table. Beyond rope_train_len its base grows with the number of tokens of the forward (NTK
rule), so a sequence that grows would change its table on the way, and a short one would get another table than the
training windows had. All of a cache's positions use the table of max(train_seq_len, max_tokens) tokens: logits are
those of the full forward of a sequence padded to that length.

All tensors have fixed shapes and addresses from the first call on, and the position is on the device: a step can be
captured in a CUDA graph. Layout (B, Hkv, T, d): a head's keys lie together, which PyTorch's attention on CPUs reads 1.4
times as fast as (B, T, Hkv, d).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_kernels import Int6Weight, causal_attention
from pgolf_kernels.ops.causal_attention.reference import exclude_own_value

from .errors import InputError
from .model import GPT, rotary_table

WINDOW = 256  # capacity is a multiple of it, and so is what a captured step reads of it


class KVCache:
    """The state of one batch of sequences of equal length.

    Args:
        model: whose layers it serves. Its matrices are cast here, once: the cache does not see later changes.
        batch: sequences.
        max_tokens: positions they can reach.
        packed: int6 matrices, by published name, to multiply by instead of the model's own.

    Attributes:
        num_tokens: positions taken in, as the host counts.
        position: the same on the device, int64 [1].
        rotary: cos and sin of the positions that a forward is at.
        window: None: a step attends to exactly the positions there are. A number: to the first `window` rows, of which
            those beyond the position are masked; so its shape does not change from step to step.
    """

    def __init__(self, model: GPT, batch: int, max_tokens: int, packed: Mapping[str, Int6Weight] | None = None) -> None:
        if batch < 1 or max_tokens < 1:
            raise InputError(f"KVCache: batch and max_tokens must be at least 1, got {batch} and {max_tokens}")
        cfg, dtype, device = model.cfg, model.activation_dtype, model.tok_emb.weight.device
        self.max_tokens, self.num_tokens, self.window = max_tokens, 0, None
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.capacity = -(-max_tokens // WINDOW) * WINDOW
        shape = (len(model.layer_order()), batch, cfg.num_kv_heads, self.capacity, cfg.head_dim)
        # Zeros: masked rows have weight 0, and 0 * NaN would be NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self._values = torch.zeros(shape, dtype=dtype, device=device).unbind()
        table = rotary_table(cfg, max(cfg.train_seq_len, max_tokens), device)
        self._cos, self._sin = (t[:max_tokens].to(dtype) for t in table)
        self._mask: Tensor | None = None
        self._last: dict[str, Tensor] = {}
        self.matrices = _decoding_matrices(model, packed or {})

    def begin(self, num_new: int) -> None:
        """Make ready for a forward over num_new positions."""
        if self.num_tokens + num_new > self.max_tokens:
            raise InputError(f"KVCache: at most {self.max_tokens} positions fit, got {self.num_tokens} + {num_new}")
        if self.num_tokens == 0:
            self.rotary = self._cos[:num_new], self._sin[:num_new]
            return
        if num_new != 1:
            raise InputError(f"KVCache: after the first call positions come one at a time, got {num_new}")
        self._mask = None
        if self.window is not None:
            rows = torch.arange(self.window, device=self.position.device)[None, None, None]
            self._mask = torch.zeros_like(rows, dtype=self._cos.dtype).masked_fill(rows > self.position, -torch.inf)
        self.rotary = self._cos.index_select(0, self.position), self._sin.index_select(0, self.position)

    def end(self, num_new: int) -> None:
        """The forward is done: its positions are part of the past."""
        self.position += num_new
        self.num_tokens += num_new

    def look_back(self, name: str, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f over the whole sequence, for an f that reads positions t - 1 and t: its part for x, the new [B, T, ...]."""
        if self.num_tokens == 0:
            self._last[name] = x[:, -1:].clone()
            return f(x)
        y = f(torch.cat((self._last[name], x), 1))[:, 1:]
        self._last[name].copy_(x)
        return y

    def attend(self, execution: int, q: Tensor, k: Tensor, v: Tensor, exclude_self: bool) -> Tensor:
        """causal_attention over the whole sequence, for its new positions.

        Args:
            execution: which of the forward's attention layers this is, in the order they run.
            q: (B, T, H, d).
            k, v: (B, T, Hkv, d); they are kept.

        Returns:
            (B, T, H, d).
        """
        B, T, H, d = q.shape
        keys, values = self._keys[execution], self._values[execution]
        k_bhtd, v_bhtd = k.transpose(1, 2), v.transpose(1, 2)
        if self.num_tokens == 0:
            keys[:, :, :T], values[:, :, :T] = k_bhtd, v_bhtd
            return causal_attention(q, k, v, exclude_self=exclude_self)
        keys.index_copy_(2, self.position, k_bhtd)
        values.index_copy_(2, self.position, v_bhtd)
        rows = self.num_tokens + 1 if self.window is None else self.window
        # The heads of a group are the queries of one key/value head: nothing is repeated, and no causal mask needed.
        y = F.scaled_dot_product_attention(
            q.reshape(B, k.shape[2], -1, d), keys[:, :, :rows], values[:, :, :rows], attn_mask=self._mask
        ).reshape(B, 1, H, d)
        return exclude_own_value(y, v) if exclude_self else y


def _decoding_matrices(model: GPT, packed: Mapping[str, Int6Weight]) -> dict[str, list[Tensor | Int6Weight | None]]:
    """model.matrices with the packed ones in their places, and a layer's queries, keys and values joined if alike."""
    matrices = {
        kind: [packed.get(f"blocks.{layer}.{kind}.weight", w) for layer, w in enumerate(ws)]
        for kind, ws in model.matrices().items()
    }
    kinds = ("attn.c_q", "attn.c_k", "attn.c_v")
    for layer in range(model.cfg.num_layers):
        parts = [matrices[kind][layer] for kind in kinds]
        if all(isinstance(w, Int6Weight) for w in parts):
            rows, columns = sum(w.shape[0] for w in parts), parts[0].shape[1]
            scale = torch.cat([w.scale for w in parts])
            joined = Int6Weight(torch.cat([w.packed for w in parts]), scale, (rows, columns))
        elif all(isinstance(w, Tensor) for w in parts):
            joined = torch.cat(parts)
        else:
            continue  # an artifact packs matrices by their size: queries may be int6 where keys are not
        for kind, w in zip(kinds, (joined, None, None), strict=True):
            matrices[kind][layer] = w
    return matrices
