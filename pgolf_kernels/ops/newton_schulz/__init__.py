"""Newton-Schulz orthogonalisation of one matrix or a bank of equal matrices, the heart of Muon."""

from .op import newton_schulz, newton_schulz_banks

__all__ = ["newton_schulz", "newton_schulz_banks"]
