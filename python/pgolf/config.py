"""A run is one frozen dataclass: what the model is, how it trains, how it is packed and scored.

The command line's `--set field=value`, config.json of a run and the header of an artifact are all this dataclass; an
unknown field is refused with the nearest name. Paths, ranks and devices are facts of a machine and are not in it.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass

from .config_rules import check
from .errors import InputError


@dataclass(frozen=True)
class Config:
    """One run. Lengths are in tokens, learning rates per step, times in seconds unless the name says otherwise."""

    preset: str = "custom"
    seed: int = 1337

    # Model. Names follow the Parameter Golf systems; every optional part is off at its zero value.
    vocab_size: int = 1024
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0  # hidden width = mlp_mult * model_dim
    negative_slope: float = 0.5
    logit_softcap: float = 30.0
    rope_base: float = 10000.0
    rope_dims: int = 16  # leading dimensions of each head that rotate
    rope_train_len: int = 1024  # longer sequences raise the base (NTK rule); 0: train_seq_len
    qk_gain_init: float = 1.5
    ln_scale: bool = True  # sublayer inputs of layer l are scaled by 1 / sqrt(l + 1)
    xsa_last_n: int = 4  # layers, from the last, with exclusive self-attention
    bigram_vocab_size: int = 0
    bigram_dim: int = 128
    smear_gate: bool = True
    skip_gates: bool = False  # gated (lerp) instead of plain U-Net skips
    ve_dim: int = 0  # width of the shared value embedding
    ve_layers: tuple[int, ...] = ()
    value_residual: bool = False  # later layers mix in the first layer's values (VRL)
    recur_layers: tuple[int, ...] = ()  # run these once more, right after the last of them
    recur_start_step: int = 0  # training steps before recurrence switches on, for good
    parallel_start_layer: int = 0  # decoder layers from here on run in two lanes; 0: none
    tied_embed_init_std: float = 0.005
    scaled_proj_init: bool = False  # bigram and value-embedding projections start at 1 / sqrt(2 num_layers)
    bf16_tables: bool = False  # embedding tables live in bfloat16, all other weights start from bfloat16 values
    bf16_skip_gates: bool = False  # so do the gates of the skips

    # Data
    loader: str = "coprime"  # or "sequential", "shuffled"
    train_shards: int = 0  # use at most this many shards, from the first; 0: all
    train_seq_len: int = 2048
    train_batch_tokens: int = 786432  # per optimiser step, over all ranks

    # Optimiser
    matrix_lr: float = 0.025
    muon_wd: float = 0.04
    muon_momentum: float = 0.99
    muon_momentum_warmup_start: float = 0.92
    muon_momentum_warmup_steps: int = 1500
    muon_steps: int = 5  # Newton-Schulz iterations
    muon_coefficients: str = "quintic"
    muon_row_normalize: bool = False  # MuonEq-R
    muon_comms: str = "shared"  # how ranks share Muon's work: "shared", "round_robin" or "parallel", as Muon's comms
    muon_momentum_dtype: str = "float32"  # or "bfloat16"
    muon_projections: bool = False  # Muon owns the bigram and value-embedding projections too, else AdamW
    tied_embed_lr: float = 0.035
    embed_wd: float = 0.04
    scalar_lr: float = 0.025
    adam_wd: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3  # 0: no clipping
    grad_clip_per_rank: bool = False  # clip each rank's gradient before the mean over ranks, not the mean
    average: str = "ema"  # of the weights, which is exported: "ema", "swa", "lawa" or "none", see optimise/averaging.py
    ema_decay: float = 0.997  # 0: no averaging
    swa_start: float = 0.2  # snapshots from the learning-rate multiplier below this on,
    swa_every: int = 50  # every so many steps
    lawa_every: int = 100  # snapshots every so many steps,
    lawa_k: int = 10  # of which the last so many count
    qat: str = "none"  # matrices in the forward as they will be packed: "hard" or "soft", see optimise/fake_quantise.py
    qat_start: float = 0.15  # from the learning-rate multiplier below this on; above 1: from the first step

    # Schedule. With max_seconds the warmdown follows the clock, without it the step count.
    max_steps: int = 20000
    max_seconds: float = 600.0  # 0: no time limit
    warmup_steps: int = 20  # steps that are run and then undone, to fill caches before the clock starts
    warmdown_steps: int = 3500
    warmdown_frac: float = 0.0  # above 0: warm down over this share of the budget instead of warmdown_steps
    min_lr: float = 0.0  # floor of the learning-rate multiplier

    # Running
    dtype: str = "auto"  # activations and Muon's products: "bfloat16", "float32", or what the machine multiplies fast
    compile: str = "auto"  # torch.compile: "on", "off", or on GPUs only
    micro_batch_tokens: int = 98304  # largest forward per rank; larger batches accumulate gradients
    log_every: int = 10
    val_every: int = 0  # 0: only at the end
    val_tokens: int = 0  # validation tokens used while training; 0: all
    checkpoint_every: int = 0  # 0: only at the end

    # Artifact
    attn_bits: int = 6  # 5 to 8 bits per code: matrices of attention and other projections,
    mlp_bits: int = 6  # of the MLPs,
    embed_bits: int = 8  # and embeddings and all else
    int6_clip: str = "search"  # clip of matrices: "search", "max", "quantile", or a number of standard deviations
    mlp_clip: str = ""  # of the MLPs' alone; "": int6_clip
    embed_clip: str = "quantile"  # of embeddings: 0.9999984 of each row as published, or as int6_clip
    int6_floor: float = 1 / 31  # smallest step at 6 bits, but for deviations; the published systems never go below 1/31
    attn_gptq: bool = False  # round by GPTQ, with Hessians from calibration
    mlp_gptq: bool = False
    embed_gptq: bool = False  # the token embedding, by the output of the final norm
    gptq_damping: float = 0.01  # added to a Hessian's diagonal, as a share of its mean,
    gptq_damping_times: int = 1  # this many times
    gptq_reserve_seconds: float = 0.0  # of max_seconds, for calibration: training stops this much earlier
    calibration: str = "train"  # first batches of the training data, or "generated" by the model itself
    calibration_batches: int = 64  # batches, or generated sequences of train_seq_len tokens
    calibration_batch_tokens: int = 98304  # of each training batch: the share of rank 0 in the published runs
    target_bytes: int = 0  # zero the cheapest codes of size 1 until artifact and code fit; 0: off
    float16_max_values: int = 65536  # tensors of at most this many values stay float16, as published
    compressor: str = "brotli"  # or "lzma"

    # Score
    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_batch_windows: int = 32
    eval_windows: str = "exact"  # every target once; "legacy": windows to the very end; "legacy-full": no short ones
    eval_slices: int = 1  # parts that windows are dealt to before batches are cut: the ranks of a published run
    eval_interleave: bool = False  # window i goes to part i mod eval_slices instead of to a contiguous one
    eval_stages: str = "plain,sliding"  # what `--method stages` and train_gpt.py run, in this order
    drop_val_tail: bool = True  # the challenge scores a multiple of eval_seq_len targets; False scores every token
    slot_share: str = "window"  # who shares a fit and which targets it sees: the names of scoring/objective.py
    slot_windows: str = ""  # as eval_windows, for SLOT alone; empty: the same
    # "cache": a bias per position, of the context positions like it; every slot_ field of a fit is without effect then.
    # Fitted are "bias", "delta", "both"; "logits": a bias after the softcap; "temperature", by SGD.
    slot_parameters: str = "cache"
    slot_cache_sharpness: float = 8.0  # a context position weighs exp(sharpness * (cosine of the hidden states - 1))
    slot_cache_prior: float = 0.1  # sightings that every token has in advance, seen and expected
    slot_cache_tokens: int = 4096  # slot_share "carried": scored targets before the context that are remembered, too
    slot_norm: str = "after"  # delta joins the hidden state "after" or "before" the final norm
    slot_optimizer: str = "adamw"  # "hypergradient" and "lbfgs-joint" couple the windows of a batch
    slot_normalize: str = "window"  # the loss is divided by the weights of each "window" or of the "batch"
    slot_steps: int = 3
    slot_restart_steps: int = 0  # the optimiser begins anew, from the fit so far, after so many steps; 0: never
    slot_lr: float = 0.5  # of a bias; a delta wants a tenth of it or less
    slot_lr_min: float = 0.0  # above 0: adamw's cosine ends here; hypergradient's lower bound
    slot_lr_max: float = 0.024  # hypergradient's upper bound
    slot_hyper_rate: float = 1e-5  # hypergradient's step per unit of the product of successive gradients
    slot_beta1: float = 0.0  # both 0: a step is lr * g / (|g| + eps), between the sign of g and g itself
    slot_beta2: float = 0.0
    slot_eps: float = 0.01
    slot_wd: float = 1e-8
    slot_max_iter: int = 20  # L-BFGS iterations per step
    slot_history: int = 10  # L-BFGS curvature pairs
    slot_line_search: int = 0  # L-BFGS evaluations per line search; 0: what torch >= 2.10 allows, 25: earlier ones
    slot_half_life: float = 256.0  # in tokens: context weight halves with this distance; 0: equal weights
    slot_focal_tokens: int = 0  # only targets among so many last positions of a full window are fitted to; 0: all
    slot_buckets: int = 0  # rows of a hashed table of shifts that is fitted beside delta; 0: none
    slot_clamp: float = 0.0  # bound of every fitted value; 0: none
    slot_warm_start: bool = False  # a fit begins with the newest one of the batch before it
    ctw_weight: float = 0.1  # largest share of the context tree in the mixture
    ctw_depth: int = 4  # tokens of its longest context
    ctw_entropy: float = 2.0  # in nats: where the model is surer than this it is left alone
    ttt_lr: float = 0.002  # score-first test-time training: SGD, a cosine over the chunks
    ttt_momentum: float = 0.9
    ttt_epochs: int = 3
    ttt_chunk_tokens: int = 32768  # targets that are scored before the model trains on them
    ttt_batch_seqs: int = 32  # sequences of eval_seq_len per slice and step
    ttt_freeze_blocks: int = 0  # the small tensors of the first blocks stay as they are; matrices in banks train
    ttt_grad_clip: float = 1.0  # 0: no clipping
    ttt_focal_gamma: float = 0.0  # above 0: each token's loss is scaled by (1 - its probability)^gamma

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def train_seconds(self) -> float:
        """Seconds of optimiser steps: max_seconds less what calibration needs of them; 0: no time limit."""
        return self.max_seconds - self.gptq_reserve_seconds if self.max_seconds and self.uses_gptq else self.max_seconds

    def recurs_at(self, step: int) -> bool:
        """Whether training step `step`, counted from 0, runs the recurrent layers twice."""
        return bool(self.recur_layers) and step >= self.recur_start_step

    def recurs_after(self, steps: int) -> bool:
        """Whether a model trained for `steps` steps does: as its last step did."""
        return self.recurs_at(max(steps - 1, 0))

    @property
    def averages(self) -> bool:
        """Whether other weights than the last ones are exported."""
        return self.average != "none" and (self.average != "ema" or self.ema_decay > 0)

    @property
    def uses_gptq(self) -> bool:
        return self.attn_gptq or self.mlp_gptq or self.embed_gptq

    def __post_init__(self) -> None:
        check(self)

    def replace(self, **changes: object) -> "Config":
        """A copy with some fields changed; refuses unknown names with the nearest one."""
        for name in changes:
            if name not in FIELDS:
                raise InputError(f"config: unknown field {name!r}{nearest(name, FIELDS)}")
        return dataclasses.replace(self, **changes)

    def with_settings(self, settings: list[str]) -> "Config":
        """Apply `field=value` strings; values are read by the field's type (tuples as 4,5)."""
        changes = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise InputError(f"config: a setting must read field=value, got {setting!r}")
            if name not in FIELDS:
                raise InputError(f"config: unknown field {name!r}{nearest(name, FIELDS)}")
            changes[name] = parse_value(f"config: {name}", FIELDS[name], text)
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        values = json.loads(text)
        for name, value in values.items():
            if name in FIELDS and typing.get_origin(FIELDS[name]) is tuple:
                values[name] = tuple(value)
        return cls().replace(**values)


FIELDS: dict[str, type | types.GenericAlias] = typing.get_type_hints(Config)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def parse_value(label: str, kind: type | types.GenericAlias, text: str) -> object:
    """`text` as a field's type; `label` says in the error whose value it is."""
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(
            kind, "numbers separated by commas"
        )
        raise InputError(f"{label} must be {wanted}, got {text!r}") from None
