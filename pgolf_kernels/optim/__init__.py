"""Optimisers for small GPTs: Muon for matrices and banks of them, AdamW for everything else."""

from .adamw import AdamW
from .muon import ADJUST_LR, Muon, default_compute_dtype

__all__ = ["ADJUST_LR", "AdamW", "Muon", "default_compute_dtype"]
