"""Fused kernels for small GPTs: the public names, in the order of the README's table."""

from . import nn, optim
from .explain import explain
from .ops.causal_attention import causal_attention
from .ops.int6_linear import Int6Weight, int6_linear, quantize_int6
from .ops.leaky_relu2_mlp import leaky_relu2_mlp
from .ops.newton_schulz import newton_schulz, newton_schulz_banks
from .ops.slot import LBFGS, AdamW, HypergradientAdamW, SlotFit, slot_fit, slot_score
from .ops.softcapped_cross_entropy import softcapped_cross_entropy

__all__ = [
    "leaky_relu2_mlp",
    "newton_schulz",
    "newton_schulz_banks",
    "quantize_int6",
    "Int6Weight",
    "int6_linear",
    "causal_attention",
    "softcapped_cross_entropy",
    "slot_fit",
    "slot_score",
    "AdamW",
    "LBFGS",
    "HypergradientAdamW",
    "SlotFit",
    "optim",
    "nn",
    "explain",
]
