"""Newton-Schulz orthogonalisation of one matrix or a bank of equal matrices, the heart of Muon."""

from .op import newton_schulz

__all__ = ["newton_schulz"]
