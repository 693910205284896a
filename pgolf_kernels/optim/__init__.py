"""Optimisers for small GPTs: Muon for matrices and banks of them, AdamW for everything else."""

from ..matmul import default_compute_dtype
from .adamw import AdamW
from .banks import ADJUST_LR
from .muon import Muon

__all__ = ["ADJUST_LR", "AdamW", "Muon", "default_compute_dtype"]
