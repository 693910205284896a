"""What each environment variable of the published systems means here: NAMES, one entry a name.

The surprise is how many of the originals' names never did anything: those are Ignored, with the reason.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """Sets a field of Config to the value, times `scale`."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class Switch:
    """0 sets a field, and `others`, to the zero value; 1 leaves them, or sets them to `on` where they are zero."""

    name: str
    on: int
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """1 sets a field to `value`, and `others`, 0 asks for anything else."""

    name: str
    value: str
    others: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Detail:
    """Sets a field, where the field `of` is one of `values` and no Choice set it; else it is answered with `why`."""

    name: str
    of: str
    values: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Fixed:
    """Only this value can be had here; `what` says what another one would ask for."""

    value: float
    what: str


@dataclass(frozen=True)
class Same:
    """Must be what the field is; `what` says what another value would ask for."""

    name: str
    what: str


@dataclass(frozen=True)
class Ignored:
    """Accepted, and answered with `why` it changes nothing."""

    why: str


@dataclass(frozen=True)
class Stage:
    """0 takes a part out of the stages that are scored, 1 makes sure it is among them."""

    part: str

    def apply(self, stages: str, on: bool) -> str:
        """eval_stages with or without the part. A score that was SLOT's alone is then plain sliding's."""
        names = stages.split(",")
        if on:
            return stages if any(self.part in name.split("+") for name in names) else f"{stages},{self.part}"
        left = ["+".join(part for part in name.split("+") if part != self.part) for name in names]
        instead = "sliding" if self.part == "slot" and "sliding" not in names else ""
        return ",".join(filter(None, (name or instead for name in left)))


@dataclass(frozen=True)
class Option:
    """Concerns this machine, not the run: read by `read_environment` itself."""


_GPTQ = Switch("attn_gptq", 1, others=("mlp_gptq",))
_CTW_DETAIL = Ignored("context tree weighting is off")
_NO_LATE_QAT = "compiling folded it away in the published runs; --set qat=hard or qat=soft trains quantised late"
_SWA = "the originals collected these weights and exported the EMA all the same; --average swa exports them"
_NO_LAWA = "averaging of late snapshots is off; LAWA_ENABLED=1 turns it on"
_UNTIED = Ignored("embedding and head are tied")
_NORMALISED_AWAY = Ignored("it scales gradients that Muon normalises; the rate in effect is MATRIX_LR")
_NEVER_READ = Ignored("the originals never used it")

NAMES: dict[str, Field | Switch | Choice | Detail | Fixed | Same | Stage | Ignored | Option] = {
    # The machine.
    "DATA_PATH": Option(),
    "DATA_DIR": Option(),
    "TOKENIZER_PATH": Option(),
    "RUN_ID": Option(),
    # Model.
    "SEED": Field("seed"),
    "VOCAB_SIZE": Field("vocab_size"),
    "NUM_LAYERS": Field("num_layers"),
    "MODEL_DIM": Field("model_dim"),
    "EMBEDDING_DIM": Same("model_dim", "projections between embedding and model"),
    "NUM_HEADS": Field("num_heads"),
    "NUM_KV_HEADS": Field("num_kv_heads"),
    "MLP_MULT": Field("mlp_mult"),
    "NEGATIVE_SLOPE": Field("negative_slope"),
    "TIE_EMBEDDINGS": Fixed(1, "an untied head"),
    "TIED_EMBED_INIT_STD": Field("tied_embed_init_std"),
    "LOGIT_SOFTCAP": Field("logit_softcap"),
    "ROPE_BASE": Field("rope_base"),
    "ROPE_DIMS": Field("rope_dims"),
    "ROPE_TRAIN_SEQ_LEN": Ignored("the original read it and used TRAIN_SEQ_LEN; the field is rope_train_len"),
    "QK_GAIN_INIT": Field("qk_gain_init"),
    "LN_SCALE": Field("ln_scale"),
    "XSA_LAST_N": Field("xsa_last_n"),
    "BIGRAM_VOCAB_SIZE": Field("bigram_vocab_size"),
    "BIGRAM_DIM": Field("bigram_dim"),
    "TRIGRAM": Fixed(0, "trigram hashes"),
    "SKIP_GATES_ENABLED": Field("skip_gates"),
    "VE_ENABLED": Switch("ve_dim", on=128),
    "VE_DIM": Field("ve_dim"),
    "VE_LAYERS": Field("ve_layers"),
    "VRL_ENABLED": Field("value_residual"),
    "VALUE_RESIDUAL": Fixed(0, "values mixed by two free weights; the gated form is VRL_ENABLED"),
    "GATED_ATTENTION": Fixed(0, "gated attention"),
    "DTG": Fixed(0, "token gates on blocks"),
    "DTG_ENABLED": Fixed(0, "token gates on blocks"),
    "RECUR_LAYERS": Field("recur_layers"),
    "RECUR_START_STEP": Field("recur_start_step"),
    "PARALLEL_START_LAYER": Field("parallel_start_layer"),
    "MTP_NUM_HEADS": Fixed(0, "heads that predict later tokens"),
    "MTP_LOSS_WEIGHT": Ignored("there are no heads that predict later tokens"),
    # Budget, batches, schedule.
    "ITERATIONS": Field("max_steps"),
    "MAX_WALLCLOCK_SECONDS": Field("max_seconds"),
    "WARMUP_STEPS": Field("warmup_steps"),
    "WARMDOWN_ITERS": Field("warmdown_steps"),
    "WARMDOWN_FRAC": Field("warmdown_frac"),
    "MIN_LR": Field("min_lr"),
    "TRAIN_BATCH_TOKENS": Field("train_batch_tokens"),
    "TRAIN_SEQ_LEN": Field("train_seq_len"),
    "EVAL_SEQ_LEN": Field("eval_seq_len"),
    "VAL_BATCH_SIZE": Ignored("it only sets how many windows are scored at a time"),
    "VAL_BATCH_TOKENS": Ignored("it only sets how many windows are scored at a time"),
    "VAL_LOSS_EVERY": Field("val_every"),
    "TRAIN_LOG_EVERY": Field("log_every"),
    # Optimisers.
    "MATRIX_LR": Field("matrix_lr"),
    "MATRIX_LR_EARLY": _NORMALISED_AWAY,
    "MATRIX_LR_LATE": _NORMALISED_AWAY,
    "BANK_SPLIT": _NORMALISED_AWAY,
    "SCALAR_LR": Field("scalar_lr"),
    "TIED_EMBED_LR": Field("tied_embed_lr"),
    "EMBED_LR": _UNTIED,
    "HEAD_LR": _UNTIED,
    "MUON_MOMENTUM": Field("muon_momentum"),
    "MUON_MOMENTUM_WARMUP_START": Field("muon_momentum_warmup_start"),
    "MUON_MOMENTUM_WARMUP_STEPS": Field("muon_momentum_warmup_steps"),
    "MUON_BACKEND_STEPS": Field("muon_steps"),
    "MUON_BETA2": _NEVER_READ,
    "MUON_WD": Field("muon_wd"),
    "ADAM_WD": Field("adam_wd"),
    "EMBED_WD": Field("embed_wd"),
    "BETA1": Field("beta1"),
    "BETA2": Field("beta2"),
    "ADAM_EPS": Field("adam_eps"),
    "GRAD_CLIP_NORM": Field("grad_clip_norm"),
    # Averages and quantisation while training.
    "EMA_ENABLED": Ignored("the originals never read it; EMA_DECAY=0 turns averaging off"),
    "EMA_DECAY": Field("ema_decay"),
    "SWA_ENABLED": Ignored(_SWA),
    "SWA_EVERY": Detail("swa_every", of="average", values=("swa",), why=_SWA),
    "LAWA_ENABLED": Choice("average", "lawa"),
    "LAWA_K": Detail("lawa_k", of="average", values=("lawa",), why=_NO_LAWA),
    "LAWA_FREQ": Detail("lawa_every", of="average", values=("lawa",), why=_NO_LAWA),
    "QAT_ENABLED": Choice("qat", "hard", others=(("qat_start", 2.0),)),  # set before it was compiled, it was alive
    "LATE_QAT": _NEVER_READ,
    "LATE_QAT_THRESHOLD": Detail("qat_start", of="qat", values=("hard", "soft"), why=_NO_LATE_QAT),
    # Artifact.
    "USE_GPTQ": _GPTQ,
    "GPTQ_ENABLED": _GPTQ,
    "GPTQ_CALIB_SAMPLES": Field("calibration_batches"),
    "GPTQ_CALIB_BATCHES": Field("calibration_batches"),
    "GPTQ_CALIBRATION_BATCHES": Field("calibration_batches"),
    "GPTQ_BLOCK_SIZE": Ignored("the original read it and passed 128"),
    "GPTQ_RESERVE_MS": Field("gptq_reserve_seconds", scale=1e-3),
    "GPTQ_RESERVE_SECONDS": Field("gptq_reserve_seconds"),
    "QUANT_CLIP_RANGE": Fixed(31, "codes of another width than int6"),
    "COMPRESSOR": Field("compressor"),
    "CONTROL_TENSOR_NAME_PATTERNS": Ignored("small tensors are float16 whatever their names, as published"),
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": _NEVER_READ,
    # Scores.
    "EVAL_STRIDE": Field("eval_stride"),
    "SLIDING_WINDOW_ENABLED": Stage("sliding"),
    "SLOT_ENABLED": Stage("slot"),
    "SLOT_STEPS": Field("slot_steps"),
    "SLOT_LR": Field("slot_lr"),
    "SLOT_LR_MIN": Ignored("the original read it and kept the rate constant"),
    "SLOT_BATCH_SEQS": Field("eval_batch_windows"),
    "TTT_ENABLED": Stage("ttt"),
    "TTT_LR": Field("ttt_lr"),
    "TTT_EPOCHS": Field("ttt_epochs"),
    "TTT_CHUNK_TOKENS": Field("ttt_chunk_tokens"),
    "TTT_FREEZE_BLOCKS": Field("ttt_freeze_blocks"),
    "TTT_MOMENTUM": Field("ttt_momentum"),
    "TTT_BATCH_SEQS": Field("ttt_batch_seqs"),
    "TTT_GRAD_CLIP": Field("ttt_grad_clip"),
    "CTW_WEIGHT": Fixed(0, "mixing with context trees"),
    "CTW_DEPTH": _CTW_DETAIL,
    "CTW_ENTROPY_THRESHOLD": _CTW_DETAIL,
}
# Whatever begins like this is meant for us. NUM_, DATA_ and TRAIN_ are missing: other programs' variables begin so too.
PREFIXES = (
    *("SLOT_", "TTT_", "MUON_", "GPTQ_", "SWA_", "EMA_", "LATE_QAT", "QAT_", "LAWA_", "CTW_", "MTP_"),
    *("ROPE_", "RECUR_", "BIGRAM_", "VE_", "VRL_", "XSA_", "WARMDOWN_", "MATRIX_LR", "QK_GAIN"),
)
OTHERS = {"MODEL_DIR"}  # common names of other programs that a slip could turn into ours
