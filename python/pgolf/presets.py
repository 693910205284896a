"""Named runs: values of Config, and beside each what is known of it.

The four published systems keep what their code does, not what their descriptions say: so #1217's "split learning rate"
is absent (it scales gradients that Muon normalises away). Sources: openai/parameter-golf #1217, #1128, #1333, #675.
"""

import dataclasses
from dataclasses import dataclass, field

from .config import Config, nearest
from .errors import InputError
from .scoring.published import PUBLISHED as SCORING

# What the four systems have in common.
_PUBLISHED = Config(
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    mlp_mult=3.0,
    xsa_last_n=11,
    ve_dim=128,
    ve_layers=(9, 10),
    bf16_tables=True,
    train_shards=80,
    train_seq_len=2048,
    train_batch_tokens=786432,
    muon_momentum=0.99,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    grad_clip_norm=0.3,
    ema_decay=0.997,
    max_steps=20000,
    max_seconds=600.0,
    warmup_steps=20,
    warmdown_steps=3500,
    log_every=500,
    val_every=4000,
    eval_seq_len=2048,
)

PRESETS: dict[str, Config] = {
    "pr1217": _PUBLISHED.replace(
        preset="pr1217",
        qk_gain_init=5.0,
        bigram_vocab_size=2816,
        bigram_dim=112,
        skip_gates=True,
        bf16_skip_gates=True,  # their name is missing from the list of what stays float32
        matrix_lr=0.03,
        muon_row_normalize=True,
        muon_comms="parallel",
        muon_momentum_dtype="bfloat16",
        grad_clip_per_rank=True,
        attn_gptq=True,
        mlp_gptq=True,
        gptq_damping_times=2,
        gptq_reserve_seconds=9.0,
        **SCORING["pr1217"],
    ),
    "pr1128": _PUBLISHED.replace(
        preset="pr1128",
        xsa_last_n=4,
        bigram_vocab_size=1536,
        bigram_dim=128,
        loader="sequential",
        muon_comms="parallel",
        muon_momentum_dtype="bfloat16",
        grad_clip_per_rank=True,
        max_steps=9000,
        compressor="lzma",
        **SCORING["pr1128"],
    ),
    "pr1333": _PUBLISHED.replace(
        preset="pr1333",
        seed=42,
        vocab_size=4096,
        mlp_mult=4.0,
        rope_train_len=0,
        qk_gain_init=5.0,
        smear_gate=False,
        skip_gates=True,
        recur_layers=(4, 5),
        recur_start_step=3000,
        parallel_start_layer=7,
        matrix_lr=0.02,
        muon_wd=0.09,
        muon_row_normalize=True,
        muon_comms="round_robin",
        muon_projections=True,
        tied_embed_lr=0.03,
        embed_wd=0.09,
        scalar_lr=0.02,
        adam_wd=0.02,
        warmdown_steps=0,
        warmdown_frac=0.667,
        attn_gptq=True,
        mlp_gptq=True,
        gptq_reserve_seconds=10.0,
        target_bytes=16_000_000,
        **SCORING["pr1333"],
    ),
    "pr675": _PUBLISHED.replace(
        preset="pr675",
        qk_gain_init=4.0,
        bigram_vocab_size=1024,
        bigram_dim=128,
        value_residual=True,
        scaled_proj_init=True,
        loader="sequential",
        train_shards=10,
        muon_comms="round_robin",
        muon_projections=True,
        compressor="lzma",
        **SCORING["pr675"],
    ),
    # Minutes on two CPU cores: small and in many small steps, because a few million tokens are all there is time for.
    "demo": Config(
        preset="demo",
        num_layers=3,
        model_dim=256,
        num_heads=4,
        num_kv_heads=2,
        qk_gain_init=2.0,
        xsa_last_n=2,
        bigram_vocab_size=1536,
        bigram_dim=64,
        skip_gates=True,
        ve_dim=64,
        ve_layers=(1, 2),
        rope_train_len=512,
        train_seq_len=512,
        train_batch_tokens=4096,
        matrix_lr=0.03,
        tied_embed_lr=0.02,
        muon_momentum=0.9,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=60,
        scalar_lr=0.05,
        grad_clip_norm=1.0,
        ema_decay=0.95,
        max_steps=100000,
        max_seconds=180.0,
        warmup_steps=1,
        warmdown_frac=0.6,
        log_every=5,
        int6_floor=0.0,
        float16_max_values=4096,
        eval_seq_len=512,
        eval_stride=128,
        drop_val_tail=False,
    ),
    # A few seconds: what the tests train.
    "tiny": Config(
        preset="tiny",
        vocab_size=512,
        num_layers=4,
        model_dim=64,
        num_heads=4,
        num_kv_heads=2,
        mlp_mult=2.0,
        rope_dims=8,
        rope_train_len=64,
        xsa_last_n=1,
        bigram_vocab_size=256,
        bigram_dim=16,
        skip_gates=True,
        ve_dim=16,
        ve_layers=(3,),
        train_seq_len=64,
        train_batch_tokens=2048,
        matrix_lr=0.05,
        muon_momentum=0.9,
        muon_momentum_warmup_steps=0,
        grad_clip_norm=1.0,
        ema_decay=0.9,
        max_steps=200,
        max_seconds=0.0,
        warmup_steps=0,
        warmdown_frac=0.5,
        log_every=1,
        int6_floor=0.0,
        eval_seq_len=64,
        eval_stride=16,
        drop_val_tail=False,
    ),
}


@dataclass(frozen=True)
class Facts:
    """What is known of a preset beside its values; None where nothing was published.

    published_bpb: mean over the three published seeds. bpb_without_slot: of the same models; for #1217 of seed 1337
    alone, for #675 approximate. standing: of the submission. causal: whether no scored token has seen itself or a later
    one, in the published score or, without one, in ours. artifact_bytes: of the preset's seed, code included, as
    logged. step_ms: mean over a run on eight H100s. seed_bpb: the published score of each seed.
    calibration_seconds, stage_seconds (by method, mean over the seeds) and peak_mib (per GPU): as logged there.
    """

    line: str
    published_bpb: float | None = None
    bpb_without_slot: float | None = None
    standing: str | None = None
    causal: bool = True
    artifact_bytes: int | None = None
    step_ms: float | None = None
    seed_bpb: dict[int, float] = field(default_factory=dict)
    calibration_seconds: float | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: int | None = None


FACTS: dict[str, Facts] = {
    "pr1217": Facts(
        "11 layers, MuonEq-R, gated skips; one SLOT delta for 32 windows",
        published_bpb=1.1027,
        bpb_without_slot=1.1104,
        standing="open, record claim withdrawn",
        causal=False,
        artifact_bytes=15_795_518,
        step_ms=88.8,
        seed_bpb={1337: 1.10165738, 42: 1.10377675, 2024: 1.10271384},
        calibration_seconds=6.8,
        stage_seconds={"slot": 173.4, "ttt": 459.1},
        peak_mib=23_328,
    ),
    "pr1128": Facts(
        "11 layers, banks; TTT, and one SLOT delta on all positions",
        published_bpb=1.1154,
        bpb_without_slot=1.1193,
        standing="open, flagged as not causal",
        causal=False,
        artifact_bytes=15_997_676,
        step_ms=84.1,
        seed_bpb={1337: 1.11525968, 42: 1.11561121, 2025: 1.11534655},
        stage_seconds={"slot+ttt": 569.2},
    ),
    "pr1333": Facts(
        "4096 tokens, depth recurrence, parallel lanes; one SLOT delta for 32 windows",
        published_bpb=1.0766,
        bpb_without_slot=1.0897,
        standing="open, ruling pending",
        causal=False,
        artifact_bytes=15_999_461,
        step_ms=108.2,
        seed_bpb={42: 1.07620919, 314: 1.07660728, 999: 1.07700722},
        stage_seconds={"plain": 7.5, "sliding": 76.2, "slot": 444.1},
        peak_mib=30_120,
    ),
    "pr675": Facts(
        "11 layers, value residual; L-BFGS SLOT on the scored tokens themselves",
        published_bpb=0.5793,
        bpb_without_slot=1.127,
        standing="closed, flagged as not causal",
        causal=False,
        artifact_bytes=15_735_483,
        step_ms=103.5,
        seed_bpb={1337: 0.57926687, 42: 0.57840039, 2025: 0.5800723},
        stage_seconds={"slot": 545.6},
    ),
    "demo": Facts("minutes on two CPU cores"),
    "tiny": Facts("seconds; what the tests train"),
}


def preset(name: str) -> Config:
    """The preset called `name`; refuses others with the nearest name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def describe() -> list[dict]:
    """Every preset as JSON values: {"name", "parameters", and the fields of Facts}."""
    from .model import GPT  # torch is slow to import, and a name is looked up without it

    return [
        {"name": name, "parameters": GPT.count_parameters(cfg), **dataclasses.asdict(FACTS[name])}
        for name, cfg in PRESETS.items()
    ]


def table(rows: list[dict]):
    """`describe`'s rows as a rich table."""
    from rich.table import Table

    result = Table("preset", "what it is", box=None, pad_edge=False)
    for name in ("parameters", "bpb", "no SLOT", "causal", "bytes", "ms/step"):
        result.add_column(name, justify="right")
    for row in rows:
        published = row["published_bpb"] is not None
        figures = (
            f"{row['parameters']:,}",
            f"{row['published_bpb']:.4f}" if published else "",
            f"{row['bpb_without_slot']:.4f}" if published else "",
            "yes" if row["causal"] else "no",
            f"{row['artifact_bytes']:,}" if published else "",
            f"{row['step_ms']:.1f}" if published else "",
        )
        standing = f" ({row['standing']})" if published else ""
        result.add_row(row["name"], row["line"] + standing, *figures)
    return result
