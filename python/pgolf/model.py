"""The GPT of the Parameter Golf systems, whole: one definition for training, quantised scoring and adaptation.

All matrices of one kind live in one bank, [layers, out, in], so that an optimiser orthogonalises them in one batch.
Linear maps have no bias and norms have no weight. The names of parameters are those of the published checkpoints;
`export_state` splits the banks into them, `load_export` joins them again.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_kernels import causal_attention, leaky_relu2_mlp, softcapped_cross_entropy
from pgolf_kernels.optim import default_compute_dtype

from .config import Config

NORM_EPS = 1.1920929e-7  # float32's epsilon in every dtype: embeddings start at 0.005, bfloat16's would swamp them


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def rotary_table(cfg: Config, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, rope_dims / 2], float32. Sequences beyond rope_train_len raise the base (NTK rule)."""
    dims, base = cfg.rope_dims, cfg.rope_base
    if num_tokens > cfg.rope_train_len and dims > 2:
        base *= (num_tokens / cfg.rope_train_len) ** (dims / (dims - 2))
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
        self.num_heads, self.num_kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.exclude_self = layer >= cfg.num_layers - cfg.xsa_last_n
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        if cfg.value_residual and layer > 0:
            self.vrl_gate = nn.Parameter(torch.tensor(-1.5))

    def forward(self, x, w_q, w_k, w_v, w_o, cos, sin, ve: Tensor | None, v_first: Tensor | None):
        B, T, D = x.shape
        q = rms_norm(F.linear(x, w_q).view(B, T, self.num_heads, -1))
        k = rms_norm(F.linear(x, w_k).view(B, T, self.num_kv_heads, -1))
        v_raw = F.linear(x, w_v)  # (B, T, kv_dim)
        v = v_raw if ve is None else v_raw + ve
        if v_first is not None:
            g = torch.sigmoid(self.vrl_gate).to(x.dtype)
            v = (1 - g) * v + g * v_first
        q = rotate(q, cos, sin) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(k, cos, sin)
        y = causal_attention(q, k, v.view(B, T, self.num_kv_heads, -1), exclude_self=self.exclude_self)
        return F.linear(y.reshape(B, T, D), w_o), v_raw


class Block(nn.Module):
    """The small parameters of one layer."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn = Attention(cfg, layer)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim))


class GPT(nn.Module):
    """Args: cfg: shapes and options. Activations run in `activation_dtype`; parameters stay float32."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.activation_dtype = torch.float32
        self.recurrence_active = bool(cfg.recur_layers) and cfg.recur_start_step == 0
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

    def trunk(self, ids: Tensor) -> Tensor:
        """The residual stream before the final norm. ids: [B, T] int64. Returns [B, T, D] in activation_dtype."""
        cfg, dtype = self.cfg, self.activation_dtype
        x = self.tok_emb(ids).to(dtype)
        if hasattr(self, "bigram"):
            x = x + self.bigram(ids, dtype)
        x = rms_norm(x)
        if hasattr(self, "smear"):
            x = self.smear(x)
        layers = _Layers(self, ids, x)

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
        return x

    def _skip(self, i: int, x: Tensor, skip: Tensor) -> Tensor:
        skip = self.skip_weights[i].to(x.dtype) * skip
        if not self.cfg.skip_gates:
            return x + skip
        g = torch.sigmoid(self.skip_gates[i]).to(x.dtype)
        return (1 - g) * skip + g * x

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head sees: the normalised residual stream, [B, T, D]."""
        return rms_norm(self.trunk(ids))

    def head_weight(self) -> Tensor:
        """[V, D] in activation_dtype; tied to the token embedding."""
        return self.tok_emb.weight.to(self.activation_dtype)

    def logits(self, ids: Tensor) -> Tensor:
        """Soft-capped logits, [B, T, V] float32."""
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(F.linear(self.hidden(ids), self.head_weight()).float() / cap)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of targets [B, T] given ids [B, T], in nats per token."""
        return softcapped_cross_entropy(
            self.hidden(ids), self.head_weight(), targets, softcap=self.cfg.logit_softcap, reduction=reduction
        )

    def export_state(self) -> dict[str, Tensor]:
        """Parameters under the published names, one matrix per layer; views where possible."""
        state = {}
        for name, value in self.state_dict().items():
            if name in _BANKS:
                for half, published in enumerate(_BANKS[name]):
                    for layer in range(self.cfg.num_layers):
                        state[f"blocks.{layer}.{published}.weight"] = value[half * self.cfg.num_layers + layer]
            else:
                state[name] = value
        return state

    def load_export(self, state: dict[str, Tensor]) -> None:
        """The inverse of export_state; raises KeyError on a missing name and RuntimeError on extra ones."""
        state = dict(state)
        for bank, published in _BANKS.items():
            matrices = [state.pop(f"blocks.{i}.{p}.weight") for p in published for i in range(self.cfg.num_layers)]
            state[bank] = torch.stack(matrices)
        self.load_state_dict(state)


_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}


class _Layers:
    """What all layers of one forward share: cast banks, rotary table, the first stream and the values to mix in."""

    def __init__(self, model: GPT, ids: Tensor, x0: Tensor):
        cfg, dtype = model.cfg, x0.dtype
        self.cfg, self.blocks, self.x0 = cfg, model.blocks, x0
        # unbind, not indexing: its backward stacks once, where every index would fill a bank of zeros.
        self.qo, self.kv = model.qo_bank.to(dtype).unbind(), model.kv_bank.to(dtype).unbind()
        self.up, self.down = model.mlp_up_bank.to(dtype).unbind(), model.mlp_down_bank.to(dtype).unbind()
        cos, sin = rotary_table(cfg, ids.shape[1], ids.device)
        self.cos, self.sin = cos.to(dtype), sin.to(dtype)
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
        block, L = self.blocks[layer], self.cfg.num_layers
        v_first = self.v_first if hasattr(block.attn, "vrl_gate") else None
        y, v_raw = block.attn(
            self._input(layer, x),
            self.qo[layer],
            self.kv[layer],
            self.kv[L + layer],
            self.qo[L + layer],
            self.cos,
            self.sin,
            self.ve.get(layer),
            v_first,
        )
        if layer == 0 and self.v_first is None:
            self.v_first = v_raw
        return block.attn_scale.to(x.dtype) * y

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        y = leaky_relu2_mlp(self._input(layer, x), self.up[layer], self.down[layer], self.cfg.negative_slope)
        return self.blocks[layer].mlp_scale.to(x.dtype) * y
