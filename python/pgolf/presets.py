"""Named runs: values of Config and nothing else."""

from .config import Config, nearest
from .errors import InputError

PRESETS: dict[str, Config] = {
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
        slot_parameters="bias",
        slot_lr=0.06,
        slot_half_life=128.0,
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
        slot_parameters="bias",
        slot_lr=0.06,
    ),
}


def preset(name: str) -> Config:
    """The preset called `name`; refuses others with the nearest name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]
