"""The GPT of the Parameter Golf systems, whole: one definition for training, quantised scoring and adaptation.

All matrices of one kind live in one bank, [layers, out, in], so that an optimiser orthogonalises them in one batch.
Linear maps have no bias and norms have no weight. The names of parameters are those of the published checkpoints;
`export_state` splits the banks into them, `load_export` joins them again. The same forward decodes token by token:
given a KVCache it runs on the new positions alone.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_kernels import Int6Weight, causal_attention, int6_linear, leaky_relu2_mlp, softcapped_cross_entropy
from pgolf_kernels.optim import default_compute_dtype

from .config import Config

if TYPE_CHECKING:
    from .kv_cache import KVCache

NORM_EPS = 1.1920929e-7  # float32's epsilon in every dtype: embeddings start at 0.005, bfloat16's would swamp them


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def rotary_table(cfg: Config, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, rope_dims / 2], float32. Sequences beyond rope_train_len raise the base (NTK rule)."""
    dims, base, train_len = cfg.rope_dims, cfg.rope_base, cfg.rope_train_len or cfg.train_seq_len
    if num_tokens > train_len and dims > 2:
        base *= (num_tokens / train_len) ** (dims / (dims - 2))
    inv_freq = base ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angle = torch.arange(num_tokens, dtype=torch.float32, device=device)[:, None] * inv_freq
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head, pairing dimension j with j + rope_dims / 2."""
    if not cos.shape[-1]:
        return x
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, half)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def bigram_index(ids: Tensor, num_buckets: int) -> Tensor:
    """Hash of (previous, current) token into num_buckets - 1 rows; the last row stands for "no previous token"."""
    ids = ids.int()  # the published hash is 32-bit
    mixed = (36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])
    return F.pad(mixed % (num_buckets - 1), (1, 0), value=num_buckets - 1)


def activation_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """What cfg.dtype means on this device; "auto" is bfloat16 where the machine multiplies it faster than float32."""
    return default_compute_dtype(device) if cfg.dtype == "auto" else getattr(torch, cfg.dtype)


def linear(x: Tensor, w: Tensor | Int6Weight) -> Tensor:
    """x w^T. Training multiplies by tensors; decoding may keep an artifact's matrices packed."""
    return int6_linear(x, w) if isinstance(w, Int6Weight) else F.linear(x, w)


def mlp(x: Tensor, w_up: Tensor | Int6Weight, w_down: Tensor | Int6Weight, negative_slope: float) -> Tensor:
    if isinstance(w_up, Tensor) and isinstance(w_down, Tensor):
        return leaky_relu2_mlp(x, w_up, w_down, negative_slope)
    return linear(F.leaky_relu(linear(x, w_up), negative_slope).square(), w_down)


class BigramHash(nn.Module):
    def __init__(self, num_buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.embed = nn.Embedding(num_buckets, dim)
        self.proj = nn.Linear(dim, model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        e = self.embed(bigram_index(ids, self.embed.num_embeddings)).to(dtype)
        return F.linear(e, self.proj.weight.to(dtype)) * self.scale.to(dtype)


class SmearGate(nn.Module):
    """Blend every position with the one before it; starts as the mean of the two."""

    def __init__(self, model_dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(model_dim))

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)
        return (1 - g) * x + g * F.pad(x[:, :-1], (0, 0, 1, 0))


class ValueEmbedding(nn.Module):
    """One token table whose projection is added to the values of a few layers."""

    def __init__(self, vocab_size: int, dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.proj = nn.Linear(dim, kv_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(self.embed(ids).to(dtype), self.proj.weight.to(dtype)) * self.scale.to(dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; its matrices come from the model's banks."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.kv_dim = (
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.num_kv_heads * cfg.head_dim,
        )
        self.exclude_self = layer >= cfg.num_layers - cfg.xsa_last_n
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        if cfg.value_residual and layer > 0:
            self.vrl_gate = nn.Parameter(torch.tensor(-1.5))

    def forward(
        self, x, w_q, w_k, w_v, w_o, cos, sin, ve: Tensor | None, v_first: Tensor | None, attend: Callable
    ) -> tuple[Tensor, Tensor]:
        """attend: causal_attention, or a cache's, which sees the keys and values of earlier positions too.

        w_k and w_v may be None: then w_q has their rows below its own, for steps where every call counts.
        """
        B, T, D = x.shape
        if w_k is None:
            qk, v_raw = linear(x, w_q).split((D + self.kv_dim, self.kv_dim), dim=-1)
            qk = rotate(rms_norm(qk.unflatten(-1, (self.num_heads + self.num_kv_heads, -1))), cos, sin)
            q, k = qk.split((self.num_heads, self.num_kv_heads), dim=2)
        else:
            q = rotate(rms_norm(linear(x, w_q).view(B, T, self.num_heads, -1)), cos, sin)
            k = rotate(rms_norm(linear(x, w_k).view(B, T, self.num_kv_heads, -1)), cos, sin)
            v_raw = linear(x, w_v)  # (B, T, kv_dim)
        v = v_raw if ve is None else v_raw + ve
        if v_first is not None:
            g = torch.sigmoid(self.vrl_gate).to(x.dtype)
            v = (1 - g) * v + g * v_first
        q = q * self.q_gain.to(x.dtype)[:, None]
        y = attend(q, k, v.view(B, T, self.num_kv_heads, -1), exclude_self=self.exclude_self)
        return linear(y.reshape(B, T, D), w_o), v_raw


class Block(nn.Module):
    """The small parameters of one layer."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn = Attention(cfg, layer)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim))


class GPT(nn.Module):
    """Args: cfg: shapes and options. Activations run in `activation_dtype`; parameters are float32 but for bf16_*.

    `recurrence_active` follows training (cfg.recurs_at); a new model has it as at step 0.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.activation_dtype = torch.float32
        self.recurrence_active = cfg.recurs_at(0)
        self.fake_quantise: Callable[[str, Tensor], Tensor] | None = None  # training's, of a bank by its name
        L, D, kv_dim = cfg.num_layers, cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.tok_emb = nn.Embedding(cfg.vocab_size, D)
        self.qo_bank = nn.Parameter(torch.empty(2 * L, D, D))  # L query, then L output matrices
        self.kv_bank = nn.Parameter(torch.empty(2 * L, kv_dim, D))  # L key, then L value matrices
        self.mlp_up_bank = nn.Parameter(torch.empty(L, cfg.mlp_dim, D))
        self.mlp_down_bank = nn.Parameter(torch.empty(L, D, cfg.mlp_dim))
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(L))
        self.num_skips = min(L // 2, L - L // 2)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips, D))
        if cfg.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(self.num_skips, D))
        if cfg.bigram_vocab_size:
            self.bigram = BigramHash(cfg.bigram_vocab_size, cfg.bigram_dim, D)
        if cfg.smear_gate:
            self.smear = SmearGate(D)
        if cfg.ve_dim and cfg.ve_layers:
            self.ve_shared = ValueEmbedding(cfg.vocab_size, cfg.ve_dim, kv_dim)
            self.ve_layer_scales = nn.ParameterList(torch.ones(1) for _ in cfg.ve_layers)
        if cfg.parallel_start_layer:
            self.lane_merge = nn.Parameter(torch.tensor(0.5))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        L = self.cfg.num_layers
        self.tok_emb.weight.normal_(std=self.cfg.tied_embed_init_std)
        for bank in (self.qo_bank, self.kv_bank, self.mlp_up_bank):
            for matrix in bank:
                nn.init.orthogonal_(matrix)
        self.qo_bank[L:].zero_()  # every layer starts as the identity
        self.mlp_down_bank.zero_()
        if hasattr(self, "bigram"):
            self.bigram.embed.weight.zero_()
            nn.init.orthogonal_(self.bigram.proj.weight)
        if hasattr(self, "ve_shared"):
            self.ve_shared.embed.weight.normal_(std=0.01)
            nn.init.orthogonal_(self.ve_shared.proj.weight)
        if self.cfg.scaled_proj_init:
            for part in (getattr(self, name) for name in ("bigram", "ve_shared") if hasattr(self, name)):
                part.proj.weight.mul_((2 * L) ** -0.5)
        self._round_weights()

    def _round_weights(self) -> None:
        """The published systems are cast to bfloat16 whole, and matrices and scales back to float32."""
        if self.cfg.bf16_tables:
            for p in self.parameters():
                p.copy_(p.bfloat16())
            for table in (m for m in self.modules() if isinstance(m, nn.Embedding)):
                table.bfloat16()
        if self.cfg.bf16_skip_gates and self.cfg.skip_gates:
            self.skip_gates.data = self.skip_gates.data.bfloat16()

    @classmethod
    def count_parameters(cls, cfg: Config) -> int:
        """Number of parameters of a config, without allocating them."""
        with torch.device("meta"):
            return sum(p.numel() for p in cls(cfg).parameters())

    def layer_order(self) -> list[int]:
        """Layers in execution order: recurrent ones run once more, right after the last of them."""
        order = list(range(self.cfg.num_layers))
        if self.recurrence_active:
            after = max(self.cfg.recur_layers) + 1
            order[after:after] = self.cfg.recur_layers
        return order

    def matrices(self) -> dict[str, Sequence[Tensor]]:
        """What layers multiply by, in activation_dtype: for each published kind ("attn.c_q"), one matrix a layer."""
        L, matrices = self.cfg.num_layers, {}
        for bank, kinds in BANKS.items():
            # unbind, not indexing: its backward stacks once, where every index would fill a bank of zeros.
            weights = getattr(self, bank)
            if self.fake_quantise is not None:
                weights = self.fake_quantise(bank, weights)
            weights = weights.to(self.activation_dtype).unbind()
            matrices |= {kind: weights[i * L : (i + 1) * L] for i, kind in enumerate(kinds)}
        return matrices

    def trunk(self, ids: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """The residual stream before the final norm.

        Args:
            ids: [B, T] int64.
            cache: of the positions before ids, which it takes in; None: ids begin the sequence.

        Returns:
            [B, T, D] in activation_dtype.
        """
        cfg, dtype = self.cfg, self.activation_dtype
        if cache is not None:
            cache.begin(ids.shape[1])
        x = self.tok_emb(ids).to(dtype)
        if hasattr(self, "bigram"):
            bigram = partial(self.bigram, dtype=dtype)
            x = x + (bigram(ids) if cache is None else cache.look_back("bigram", bigram, ids))
        x = rms_norm(x)
        if hasattr(self, "smear"):
            x = self.smear(x) if cache is None else cache.look_back("smear", self.smear, x)
        layers = _Layers(self, ids, x, cache)

        order = self.layer_order()
        num_encoder = len(order) // 2
        skips = []
        for layer in order[:num_encoder]:
            x = layers.sequential(layer, x)
            skips.append(x)

        lane = None  # the MLP lane, once there are two; x is then the attention lane
        for i, layer in enumerate(order[num_encoder:]):
            # A skip that falls due after the split into lanes has no effect, as in the published system.
            if i < self.num_skips and skips and lane is None:
                x = self._skip(i, x, skips.pop())
            if cfg.parallel_start_layer and layer >= cfg.parallel_start_layer:
                x, lane = layers.parallel(layer, x, x if lane is None else lane)
            else:
                x = layers.sequential(layer, x)
        if lane is not None:
            m = self.lane_merge.to(dtype)
            x = m * x + (1 - m) * lane
        if cache is not None:
            cache.end(ids.shape[1])
        return x

    def _skip(self, i: int, x: Tensor, skip: Tensor) -> Tensor:
        skip = self.skip_weights[i].to(x.dtype) * skip
        if not self.cfg.skip_gates:
            return x + skip
        g = torch.sigmoid(self.skip_gates[i]).to(x.dtype)
        return (1 - g) * skip + g * x

    def hidden(self, ids: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """What the head sees: the normalised residual stream, [B, T, D]."""
        return rms_norm(self.trunk(ids, cache))

    def head_weight(self) -> Tensor:
        """[V, D] in activation_dtype; tied to the token embedding."""
        return self.tok_emb.weight.to(self.activation_dtype)

    def logits(self, ids: Tensor, cache: "KVCache | None" = None, last_only: bool = False) -> Tensor:
        """Soft-capped logits, [B, T, V] float32 (T = 1 if last_only)."""
        hidden, cap = self.hidden(ids, cache), self.cfg.logit_softcap
        hidden = hidden[:, -1:] if last_only else hidden
        return cap * torch.tanh(F.linear(hidden, self.head_weight()).float() / cap)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of targets [B, T] given ids [B, T], in nats per token."""
        return softcapped_cross_entropy(
            self.hidden(ids), self.head_weight(), targets, softcap=self.cfg.logit_softcap, reduction=reduction
        )

    def export_state(self) -> dict[str, Tensor]:
        """Parameters under the published names, one matrix per layer; views where possible."""
        state = {}
        for name, value in self.state_dict().items():
            if name in BANKS:
                state |= zip(published_names(name, self.cfg.num_layers), value, strict=True)
            else:
                state[name] = value
        return state

    def load_export(self, state: dict[str, Tensor]) -> None:
        """The inverse of export_state; raises KeyError on a missing name and RuntimeError on extra ones."""
        state = dict(state)
        for bank in BANKS:
            state[bank] = torch.stack([state.pop(name) for name in published_names(bank, self.cfg.num_layers)])
        self.load_state_dict(state)


BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}


def published_names(bank: str, num_layers: int) -> list[str]:
    """The names of a bank's matrices in their order."""
    return [f"blocks.{layer}.{kind}.weight" for kind in BANKS[bank] for layer in range(num_layers)]


class _Layers:
    """What all layers of one forward share: cast banks, rotary table, the first stream and the values to mix in."""

    def __init__(self, model: GPT, ids: Tensor, x0: Tensor, cache: "KVCache | None"):
        cfg, dtype = model.cfg, x0.dtype
        self.cfg, self.blocks, self.x0, self.cache = cfg, model.blocks, x0, cache
        self.matrices = model.matrices() if cache is None else cache.matrices
        cos, sin = rotary_table(cfg, ids.shape[1], ids.device) if cache is None else cache.rotary
        self.cos, self.sin = cos.to(dtype), sin.to(dtype)
        self.num_executed = 0  # calls of attention; a recurrent layer has two, and in a cache two sets of keys
        self.ve: dict[int, Tensor] = {}
        if hasattr(model, "ve_shared"):
            shared = model.ve_shared(ids, dtype)
            scales = model.ve_layer_scales
            self.ve = {layer: s.to(dtype) * shared for layer, s in zip(cfg.ve_layers, scales, strict=True)}
        self.v_first: Tensor | None = None

    def sequential(self, layer: int, x: Tensor) -> Tensor:
        x = self._mix(layer, x)
        x = x + self._attention(layer, x)
        return x + self._mlp(layer, x)

    def parallel(self, layer: int, attn_lane: Tensor, mlp_lane: Tensor) -> tuple[Tensor, Tensor]:
        """Two lanes that do not read each other; only the attention lane mixes in the first stream."""
        attn_lane = self._mix(layer, attn_lane)
        return attn_lane + self._attention(layer, attn_lane), mlp_lane + self._mlp(layer, mlp_lane)

    def _mix(self, layer: int, x: Tensor) -> Tensor:
        mix = self.blocks[layer].resid_mix.to(x.dtype)
        return mix[0] * x + mix[1] * self.x0

    def _input(self, layer: int, x: Tensor) -> Tensor:
        return rms_norm(x) * (1 / math.sqrt(layer + 1)) if self.cfg.ln_scale else rms_norm(x)

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        block = self.blocks[layer]
        v_first = self.v_first if hasattr(block.attn, "vrl_gate") else None
        attend = causal_attention if self.cache is None else partial(self.cache.attend, self.num_executed)
        self.num_executed += 1
        y, v_raw = block.attn(
            self._input(layer, x),
            *(self.matrices[kind][layer] for kind in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj")),
            self.cos,
            self.sin,
            self.ve.get(layer),
            v_first,
            attend,
        )
        if layer == 0 and self.v_first is None:
            self.v_first = v_raw
        return block.attn_scale.to(x.dtype) * y

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        w_up, w_down = self.matrices["mlp.fc"][layer], self.matrices["mlp.proj"][layer]
        y = mlp(self._input(layer, x), w_up, w_down, self.cfg.negative_slope)
        return self.blocks[layer].mlp_scale.to(x.dtype) * y
