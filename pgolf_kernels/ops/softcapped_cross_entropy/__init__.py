"""Language-model head, softcap and cross-entropy as one op."""

from .op import softcapped_cross_entropy

__all__ = ["softcapped_cross_entropy"]
