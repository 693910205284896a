"""The scoring of published systems as fields of Config, by the number of their pull request at openai/parameter-golf.

A preset of a system takes its fields from here, `pgolf eval --published NAME` lays them over any artifact. eval_slices
is 8, the GPUs they ran on: which windows shared a batch depended on it. No SLOT here but "pr1217-window" is causal;
"pr1176" ran on weights that test-time training had already taken over the whole text, which is left out.
"""

from ..config import Config, nearest
from ..errors import InputError

# Every slot_ field, so that none follows Config's defaults, which are this project's own choice and may change.
_SLOT = {
    "slot_share": "window",
    "slot_windows": "",
    "slot_parameters": "delta",
    "slot_cache_sharpness": 8.0,
    "slot_cache_prior": 0.1,
    "slot_cache_tokens": 4096,
    "slot_norm": "after",
    "slot_optimizer": "adamw",
    "slot_normalize": "window",
    "slot_steps": 8,
    "slot_restart_steps": 0,
    "slot_lr": 0.005,
    "slot_lr_min": 0.0,
    "slot_lr_max": 0.024,
    "slot_hyper_rate": 1e-5,
    "slot_beta1": 0.9,
    "slot_beta2": 0.999,
    "slot_eps": 1e-5,
    "slot_wd": 1e-8,
    "slot_max_iter": 20,
    "slot_history": 10,
    "slot_line_search": 0,
    "slot_half_life": 0.0,
    "slot_focal_tokens": 0,
    "slot_buckets": 0,
    "slot_clamp": 0.0,
    "slot_warm_start": False,
}
_LEGACY = _SLOT | {"eval_stride": 64, "eval_batch_windows": 32, "eval_slices": 8, "eval_windows": "legacy"}
_SHARED = _LEGACY | {"slot_normalize": "batch", "slot_share": "shared-context"}
_PER_SAMPLE = _LEGACY | {
    "eval_interleave": True,
    "slot_share": "scored",
    "slot_normalize": "batch",
    "slot_parameters": "both",
}
_TTT = {"ttt_lr": 0.002, "ttt_epochs": 3, "ttt_chunk_tokens": 32768, "ttt_momentum": 0.9, "ttt_batch_seqs": 32}

PUBLISHED: dict[str, dict[str, object]] = {
    "pr549": _LEGACY
    | _TTT
    | {"eval_windows": "legacy-full", "ttt_freeze_blocks": 0, "eval_stages": "plain,sliding,ttt"},
    "pr1128": _SHARED
    | _TTT
    | {
        "eval_windows": "legacy-full",
        "eval_stages": "plain,sliding,slot+ttt",
        "slot_share": "shared-all-but-last",
        "slot_steps": 5,
        "slot_lr": 0.003,
        "ttt_freeze_blocks": 0,
    },
    "pr1176": _SHARED | {"slot_share": "shared-all", "slot_steps": 5, "slot_lr": 0.003},
    "pr1217": _SHARED
    | _TTT
    | {
        "eval_stages": "plain,slot,ttt",
        "slot_share": "shared-prefix",
        "slot_steps": 8,
        "slot_lr": 0.005,
        "ttt_freeze_blocks": 2,
    },
    "pr1217-shape": _SHARED | {"slot_share": "window-prefix", "slot_steps": 8, "slot_lr": 0.005},
    "pr1217-window": _SHARED | {"slot_share": "window", "slot_steps": 8, "slot_lr": 0.005},
    "pr1229": _PER_SAMPLE
    | {
        "eval_interleave": False,
        "slot_steps": 16,
        "slot_lr": 0.008,
        "slot_lr_min": 0.0008,
        "slot_eps": 1e-8,
        "slot_wd": 0.01,
    },
    "pr1240": _SHARED | {"slot_share": "shared-all", "slot_steps": 8, "slot_lr": 0.005},
    "pr1306": _SHARED | {"slot_steps": 8, "slot_lr": 0.005, "slot_beta1": 0.3, "slot_beta2": 0.9},
    "pr1313": _PER_SAMPLE | {"eval_stride": 96, "slot_steps": 24, "slot_lr": 0.012, "slot_lr_min": 0.001},
    "pr1333": _SHARED
    | {
        "eval_windows": "exact",
        "slot_windows": "legacy",
        "eval_stages": "plain,sliding,slot",
        "slot_norm": "before",
        "slot_steps": 16,
        "slot_lr": 0.008,
        "slot_beta1": 0.3,
        "slot_beta2": 0.9,
    },
    "pr1350": _SHARED
    | {
        "slot_parameters": "logits",
        "slot_optimizer": "lbfgs",
        "slot_steps": 1,
        "slot_lr": 1.0,
        "slot_max_iter": 25,
        "slot_history": 20,
        "slot_focal_tokens": 128,
        "slot_clamp": 5.0,
        "slot_warm_start": True,
    },
    "pr675-hypergradient": _PER_SAMPLE
    | {
        "eval_stride": 96,
        "slot_optimizer": "hypergradient",
        "slot_steps": 24,
        "slot_lr": 0.012,
        "slot_lr_min": 0.001,
        "slot_lr_max": 0.024,
        "slot_hyper_rate": 1e-5,
    },
    "pr675": _PER_SAMPLE
    | {
        "eval_stride": 96,
        "eval_stages": "slot",
        "slot_optimizer": "lbfgs-joint",
        "slot_steps": 8,
        "slot_lr": 0.1,
        "slot_max_iter": 5,
        "slot_history": 10,
    },
}
PUBLISHED["pr675-restart"] = PUBLISHED["pr675-hypergradient"] | {"slot_steps": 48, "slot_restart_steps": 24}


def published_settings(name: str) -> list[str]:
    """A published system's scoring as `field=value` settings, its other ttt_ fields at their defaults."""
    if name not in PUBLISHED:
        raise InputError(f"unknown scoring {name!r}{nearest(name, PUBLISHED)}; published: {', '.join(PUBLISHED)}")
    defaults = {k: v for k, v in vars(Config()).items() if k.startswith("ttt_")}
    return [f"{field}={value}" for field, value in (defaults | PUBLISHED[name]).items()]
