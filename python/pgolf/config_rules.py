"""What the values of a Config must satisfy, alone and together: every rule is one line, said before any work starts."""

import math
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from .config import Config

AT_LEAST_ONE = (
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "train_seq_len",
    "train_batch_tokens",
    "max_steps",
    "micro_batch_tokens",
    "log_every",
    "swa_every",
    "lawa_every",
    "lawa_k",
    "gptq_damping_times",
    "calibration_batches",
    "calibration_batch_tokens",
    "eval_seq_len",
    "eval_batch_windows",
    "eval_slices",
    "slot_max_iter",
    "slot_history",
    "ttt_batch_seqs",
)
NOT_NEGATIVE = (
    "parallel_start_layer",
    "recur_start_step",
    "rope_train_len",
    "train_shards",
    "target_bytes",
    "slot_steps",
    "slot_restart_steps",
    "slot_line_search",
    "slot_focal_tokens",
    "slot_half_life",
    "slot_cache_sharpness",
    "slot_cache_tokens",
    "slot_buckets",
    "ctw_depth",
    "ttt_epochs",
)
CLIPS = ("search", "max", "quantile")
CHOICES = {
    "loader": {"coprime", "sequential", "shuffled"},
    "compile": {"auto", "on", "off"},
    "dtype": {"auto", "bfloat16", "float32"},
    "average": {"ema", "swa", "lawa", "none"},
    "qat": {"none", "hard", "soft"},
    "muon_coefficients": {"quintic", "polar_express"},
    "muon_comms": {"shared", "round_robin", "parallel"},
    "muon_momentum_dtype": {"float32", "bfloat16"},
    "calibration": {"train", "generated"},
    "compressor": {"brotli", "lzma"},
    "eval_windows": {"exact", "legacy", "legacy-full"},
    "slot_windows": {"", "exact", "legacy", "legacy-full"},
    "slot_share": {"window", "frontier", "carried", "window-prefix", "scored"}
    | {"shared-context", "shared-prefix", "shared-all", "shared-all-but-last"},
    "slot_parameters": {"cache", "delta", "bias", "both", "logits", "temperature"},
    "slot_norm": {"after", "before"},
    "slot_optimizer": {"adamw", "hypergradient", "lbfgs", "lbfgs-joint"},
    "slot_normalize": {"window", "batch"},
}


def check(cfg: "Config") -> None:
    """Raise InputError at the first rule that cfg breaks."""
    for name in AT_LEAST_ONE:
        _must(getattr(cfg, name) >= 1, f"{name} must be at least 1, got {getattr(cfg, name)}")
    for name in NOT_NEGATIVE:
        _must(getattr(cfg, name) >= 0, f"{name} must be at least 0, got {getattr(cfg, name)}")
    for name, allowed in CHOICES.items():
        _must(getattr(cfg, name) in allowed, f"{name} must be one of {sorted(allowed)}, got {getattr(cfg, name)!r}")
    _check_model(cfg)
    _check_training(cfg)
    _check_packing(cfg)
    _check_scoring(cfg)


def _must(condition: bool, text: str) -> None:
    if not condition:
        raise InputError(f"config: {text}")


def _check_model(cfg: "Config") -> None:
    _must(cfg.vocab_size <= 65536, f"vocab_size must be at most 65536 (shards store uint16), got {cfg.vocab_size}")
    _must(cfg.bigram_vocab_size != 1, "bigram_vocab_size must be 0 (none) or at least 2, got 1")
    _must(
        cfg.model_dim % cfg.num_heads == 0,
        f"model_dim {cfg.model_dim} must be a multiple of num_heads {cfg.num_heads}",
    )
    _must(
        cfg.num_heads % cfg.num_kv_heads == 0,
        f"num_heads {cfg.num_heads} must be a multiple of num_kv_heads {cfg.num_kv_heads}",
    )
    _must(
        cfg.rope_dims % 2 == 0 and 0 <= cfg.rope_dims <= cfg.head_dim,
        f"rope_dims must be even and at most the head dimension {cfg.head_dim}, got {cfg.rope_dims}",
    )
    for name in ("ve_layers", "recur_layers"):
        layers = getattr(cfg, name)
        _must(
            all(0 <= i < cfg.num_layers for i in layers),
            f"{name} must name layers below {cfg.num_layers}, got {layers}",
        )
    _must(
        cfg.parallel_start_layer < cfg.num_layers,
        f"parallel_start_layer must name a layer below num_layers {cfg.num_layers}, got {cfg.parallel_start_layer}",
    )


def _check_training(cfg: "Config") -> None:
    _must(
        cfg.train_batch_tokens % cfg.train_seq_len == 0,
        f"train_batch_tokens {cfg.train_batch_tokens} must be a multiple of train_seq_len {cfg.train_seq_len}",
    )
    _must(0 <= cfg.ema_decay < 1, f"ema_decay must lie in 0..1, below 1, got {cfg.ema_decay}")
    _must(
        cfg.muon_comms != "parallel" or cfg.grad_clip_per_rank,
        "muon_comms 'parallel' leaves no rank a whole gradient to clip: grad_clip_per_rank must be true, got false",
    )
    _must(
        cfg.max_seconds == 0 or 0 <= cfg.gptq_reserve_seconds < cfg.max_seconds,
        f"gptq_reserve_seconds must leave some of max_seconds {cfg.max_seconds:g} for training, "
        f"got {cfg.gptq_reserve_seconds:g}",
    )


def _check_packing(cfg: "Config") -> None:
    for name in ("attn_bits", "mlp_bits", "embed_bits"):
        _must(5 <= getattr(cfg, name) <= 8, f"{name} must lie in 5..8, got {getattr(cfg, name)}")
    for name in ("int6_clip", "mlp_clip", "embed_clip"):
        text = getattr(cfg, name) or (cfg.int6_clip if name == "mlp_clip" else "")
        try:
            clip_value(text)
        except InputError as error:
            raise InputError(f"config: {name} {error}") from None
    _must(0 < cfg.gptq_damping < 1, f"gptq_damping must lie between 0 and 1, got {cfg.gptq_damping}")


def _check_scoring(cfg: "Config") -> None:
    _must(
        0 < cfg.eval_stride <= cfg.eval_seq_len,
        f"eval_stride must lie in 1..eval_seq_len {cfg.eval_seq_len}, got {cfg.eval_stride}",
    )
    shared = cfg.slot_share not in ("window", "window-prefix", "scored")
    _must(
        shared or cfg.slot_parameters != "logits",
        f"slot_parameters 'logits' needs a slot_share that is shared, got {cfg.slot_share!r}",
    )
    _must(
        cfg.slot_parameters != "logits" or cfg.slot_norm == "after",
        "slot_parameters 'logits' joins behind the norm: slot_norm must be 'after', got 'before'",
    )
    _must(
        cfg.slot_parameters != "cache" or cfg.slot_share in ("window", "carried"),
        "slot_parameters 'cache' remembers a window's context, or what was scored before it, too: slot_share must be "
        f"'window' or 'carried', got {cfg.slot_share!r}; the others are of a fit, of 'bias' or 'delta'",
    )
    _must(cfg.slot_cache_prior > 0, f"slot_cache_prior must be > 0, got {cfg.slot_cache_prior}")
    plain = cfg.slot_optimizer == "adamw" and not (cfg.slot_warm_start or cfg.slot_clamp or cfg.slot_restart_steps)
    _must(
        plain or not cfg.slot_buckets and cfg.slot_parameters != "temperature",
        "slot_buckets and slot_parameters 'temperature' know no slot_optimizer, slot_warm_start, slot_clamp and "
        "slot_restart_steps; leave those at their defaults",
    )
    _must(
        cfg.slot_share != "carried" or not cfg.slot_buckets and cfg.slot_parameters != "temperature",
        "slot_buckets and slot_parameters 'temperature' are fitted before a batch is scored: slot_share must not be "
        "'carried'",
    )
    _must(
        not cfg.slot_buckets or cfg.slot_parameters == "delta",
        f"slot_buckets stand beside a delta: slot_parameters must be 'delta', got {cfg.slot_parameters!r}",
    )
    _must(0 <= cfg.ctw_weight <= 1, f"ctw_weight must lie in 0..1, got {cfg.ctw_weight}")
    _must(
        not shared or cfg.slot_optimizer != "lbfgs-joint",
        f"slot_optimizer 'lbfgs-joint' joins fits per window, but slot_share is {cfg.slot_share!r}; use 'lbfgs'",
    )
    _must(
        0 <= cfg.ttt_freeze_blocks <= cfg.num_layers,
        f"ttt_freeze_blocks must lie in 0..num_layers {cfg.num_layers}, got {cfg.ttt_freeze_blocks}",
    )
    _must(cfg.ttt_chunk_tokens >= 1, f"ttt_chunk_tokens must be at least 1, got {cfg.ttt_chunk_tokens}")


def clip_value(text: str) -> str | float:
    """What a clip of the config means: one of CLIPS, or a number of standard deviations."""
    if text in CLIPS:
        return text
    try:
        deviations = float(text)
    except ValueError:
        deviations = math.nan
    if not (math.isfinite(deviations) and deviations > 0):
        raise InputError(f"must be one of {', '.join(CLIPS)} or a positive number of standard deviations, got {text!r}")
    return deviations
